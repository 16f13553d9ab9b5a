"""Stage two needs neither the teacher's weights nor any code that could run a teacher."""

from distill_cases import (
    add_teacher,
    column,
    make_store,
    read_summary,
    run_cli,
    save_teacher,
    write_part,
)

# Importing a forbidden module fails as if it were not installed.
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("molkd.pipeline.teachers", "molkd.pipeline.caching")):
            raise ModuleNotFoundError(f"{name} is gone", name=name)
sys.meta_path.insert(0, Blocker())
"""


def test_a_student_learns_where_no_teacher_is_left(tmp_path):
    teacher = save_teacher(tmp_path / "teacher.safetensors")
    data, test = write_part(tmp_path / "data.extxyz", 0, 36), write_part(tmp_path / "test.extxyz", 36, 48)
    store = add_teacher(make_store(tmp_path / "coll.kdcache", data), teacher)
    teacher.unlink()
    blocked = run_cli("cache-teacher", store, "--teacher", teacher, setup=BLOCKER)
    assert blocked.returncode == 1
    assert "is gone" in blocked.stderr
    terms = [f"--kd={term}" for term in ("n2n=auto", "v2v=auto", "vanilla1=1", "vanilla2=auto")]
    sizes = [f"--set=model.{k}" for k in ("hidden_channels=16", "num_layers=2", "num_rbf=8", "cutoff=4")]
    limits = ("--steps", 20, "--set", "log_every=1", "--test", test, "--out", tmp_path / "run")
    student = ("train-student", store, "--student", "painn-tiny")
    result = run_cli(*student, *terms, *sizes, *limits, setup=BLOCKER)
    assert result.returncode == 0, result.stderr
    loss = column(tmp_path / "run", "train_loss")
    assert len(loss) == 20
    assert read_summary(tmp_path / "run")["test"]["test"]["force_mae_meV_A"] > 0

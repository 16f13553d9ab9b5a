"""Files that are no checkpoint, damaged, hostile or not what their config says."""

import contextlib
import os
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch
from ocp_files import changed, checkpoint_path, settings_of

from molkd.pipeline.errors import TeacherError
from molkd.pipeline.teachers.load import load_teacher
from molkd.pipeline.teachers.ocp.reading import read_torch_file


class MakeFolder:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Evaluate:
    def __init__(self, code):
        self.code = code

    def __reduce__(self):
        return eval, (self.code,)


def load(path):
    return load_teacher(str(path), device="cpu")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["config", "state_dict", "val_metrics"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, zipped, place):
    trace = tmp_path / "was-here"

    def infect(content):
        content[place] = {"x": MakeFolder(str(trace)), "y": content[place]}

    path = changed("painn", "best_checkpoint", infect, tmp_path / "x.pt")
    if not zipped:
        content = {"state_dict": {}, place: MakeFolder(str(trace))}
        torch.save(content, path, _use_new_zipfile_serialization=False)
    with pytest.raises(
        TeacherError, match=r"x\.pt: refused, its pickle asks for (posix|nt)\.mkdir.*Nothing was run"
    ):
        load(path)
    assert not trace.exists()


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_plain_pickle_is_not_run_either(tmp_path, protocol):
    trace = tmp_path / "was-here"
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps({"state_dict": Evaluate(f"open({str(trace)!r}, 'w')")}, protocol))
    with pytest.raises(TeacherError, match=r"x\.pt"):
        load(path)
    assert not trace.exists()


def test_objects_of_other_packages_are_named(tmp_path):
    path = changed(
        "schnet", "best_checkpoint", lambda c: c.update(model=torch.nn.Linear(1, 1)), tmp_path / "x.pt"
    )
    with pytest.raises(TeacherError, match=r"asks for torch\.nn\.modules\.linear\.Linear"):
        load(path)


def test_numpy_scalars_are_plain_data(tmp_path):
    values = {"a": np.float64(0.25), "b": np.int64(7), "c": np.float32(-1.5), "d": np.bool_(True)}
    path = changed("schnet", "best_checkpoint", lambda c: c.update(val_metrics=values), tmp_path / "x.pt")
    assert read_torch_file(path)["val_metrics"] == values
    load(path)


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numpy_scalars_of_both_major_versions(tmp_path, module):
    # The opcodes of one float64 scalar, as both write it under their own module's name.
    data = (
        b"\x80\x02}X\x01\x00\x00\x00ac" + module.encode() + b"\nscalar\n"
        b"cnumpy\ndtype\nX\x02\x00\x00\x00f8\x89\x88\x87R"
        b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"c_codecs\nencode\nX\x09\x00\x00\x00\x00\x00\x00\x00\x00\x00\xc3\xb0?"
        b"X\x06\x00\x00\x00latin1\x86R\x86Rs."
    )
    assert read_archive(tmp_path / "x.pt", data) == {"a": np.float64(1.0)}


def test_an_object_array_cannot_pass_as_a_scalar(tmp_path):
    data = (
        b"\x80\x02}X\x01\x00\x00\x00acnumpy.core.multiarray\nscalar\n"
        b"cnumpy\ndtype\nX\x01\x00\x00\x00O\x89\x88\x87RX\x01\x00\x00\x00z\x86Rs."
    )
    with pytest.raises(TeacherError, match="dtype 'O' is not a plain number"):
        read_archive(tmp_path / "x.pt", data)


def read_archive(path, pickled):
    """Read a torch file whose pickle is given."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in entries.items():
            new.writestr(name, pickled if name.endswith("data.pkl") else data)
    return read_torch_file(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files_are_named(tmp_path, zipped):
    whole = tmp_path / "whole.pt"
    torch.save(
        torch.load(checkpoint_path("painn", "best_checkpoint"), weights_only=True),
        whole,
        _use_new_zipfile_serialization=zipped,
    )
    data = whole.read_bytes()
    path = tmp_path / "x.pt"
    for length in [0, 1, 7, 100, len(data) // 3, len(data) // 2, len(data) - 200, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(TeacherError, match=r"x\.pt: truncated, damaged or no file of torch\.save"):
            load(path)


def test_damaged_bytes_give_an_error_of_ours_or_none(tmp_path):
    data = bytearray(checkpoint_path("schnet", "best_checkpoint").read_bytes())
    rng = random.Random(0)
    path = tmp_path / "x.pt"
    for _ in range(150):
        broken = data.copy()
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        path.write_bytes(broken)
        with contextlib.suppress(TeacherError):
            load(path)


@pytest.mark.parametrize("content", [[1, 2], {"weights": {}}, torch.zeros(3), {"state_dict": {}}])
def test_other_files_of_torch_are_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(TeacherError, match=r"x\.pt: .*(is no checkpoint of OCP|names no model)"):
        load(tmp_path / "x.pt")


@pytest.mark.parametrize("text", [b"", b"x", b"hello world\n" * 100])
def test_text_is_no_checkpoint(tmp_path, text):
    (tmp_path / "x.pt").write_bytes(text)
    with pytest.raises(TeacherError, match=r"x\.pt: truncated, damaged or no file"):
        load(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["dimenetplusplus", "ocpmodels.models.scn.scn.SphericalChannelNetwork"])
def test_an_unknown_architecture_is_told_what_is_supported(tmp_path, name):
    path = changed(
        "painn", "ocp2022_scale_dict_ddp", lambda c: c["config"].update(model=name), tmp_path / "x.pt"
    )
    with pytest.raises(TeacherError) as error:
        load(path)
    for part in (str(path), name, "painn", "schnet", "gemnet_oc"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("config"),
        lambda c: c["config"].pop("model"),
        lambda c: c.update(config=None),
        lambda c: c["config"].update(model="painn"),  # without model_attributes
        lambda c: c["config"].update(model={"hidden_channels": 3}),
        lambda c: c["config"].update(model={"name": "hydra"}),
        lambda c: c["config"].update(model={"name": "hydra", "backbone": {}, "heads": {"a": 3}}),
        lambda c: c["config"].update(model={"name": "hydra", "backbone": {"model": "schnet"}, "heads": 3}),
    ],
)
def test_configs_that_name_no_model(tmp_path, change):
    path = changed("painn", "best_checkpoint", lambda c: change(c) and None, tmp_path / "x.pt")
    with pytest.raises(TeacherError, match=r"x\.pt: .*(config|architecture)"):
        load(path)


@pytest.mark.parametrize("name", ["painn", "schnet", "gemnet_oc"])
def test_missing_and_left_over_tensors_are_all_named(tmp_path, name):
    dropped = []

    def damage(content):
        state = content["state_dict"]
        parameters = [k for k in state if k.endswith("weight")]
        dropped.extend(k.removeprefix("module.") for k in parameters[1:3])
        for key in parameters[1:3]:
            del state[key]
        state["module.extra.one"] = state["module.extra.two"] = torch.zeros(2)

    with pytest.raises(TeacherError) as error:
        load(changed(name, "best_checkpoint", damage, tmp_path / "x.pt"))
    message = str(error.value)
    assert all(part in message for part in [*dropped, "extra.one", "extra.two", "x.pt"])


@pytest.mark.parametrize(
    ("name", "key", "named"),
    [
        ("painn", "hidden_channels", "out_energy.0.weight has shape (8, 16), by its config (16, 32)"),
        ("schnet", "num_filters", "interactions.0.mlp.0.weight has shape (12, 20), by its config (24, 20)"),
        ("gemnet_oc", "emb_size_atom", "out_energy.linear.weight has shape (1, 12), by its config (1, 24)"),
    ],
)
def test_shapes_that_do_not_fit_the_config_are_all_named(tmp_path, name, key, named):
    def widen(content):
        settings = settings_of(content)
        settings[key] *= 2

    with pytest.raises(TeacherError) as error:
        load(changed(name, "best_checkpoint", widen, tmp_path / "x.pt"))
    assert named in str(error.value)
    assert str(error.value).count("has shape") > 3


def test_buffers_may_be_missing_but_weights_must_be_finite_tensors(tmp_path):
    def without_buffer(content):
        del content["state_dict"]["module.distance_expansion.offset"]

    load(changed("schnet", "best_checkpoint", without_buffer, tmp_path / "x.pt"))

    def not_finite(content):
        content["state_dict"]["module.lin1.bias"][0] = torch.nan

    with pytest.raises(TeacherError, match=r"not finite in lin1\.bias"):
        load(changed("schnet", "best_checkpoint", not_finite, tmp_path / "y.pt"))

    def no_tensor(content):
        content["state_dict"]["module.lin1.bias"] = 3

    with pytest.raises(TeacherError, match=r"'module\.lin1\.bias' in its state_dict is no tensor"):
        load(changed("schnet", "best_checkpoint", no_tensor, tmp_path / "z.pt"))

"""The command of a run, given to the command line again, comes to the settings of the run."""

import shlex
from pathlib import Path

import click
import pytest
import yaml

from molkd.cache_schema.reader import Cache
from molkd.cli import kd as root  # noqa: TID251
from molkd.pipeline.commands.output import given
from molkd.pipeline.config import IngestConfig
from molkd.pipeline.distill.settings import resolve
from molkd.pipeline.evaluation.reproduce import report_command, train_command
from molkd.pipeline.ingest import ingest


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    import ase.io
    from ase.build import molecule

    folder = tmp_path_factory.mktemp("store")
    ase.io.write(folder / "water.extxyz", molecule("H2O"))
    ingest(IngestConfig(data=(folder / "water.extxyz",), store=folder / "my store.kdcache"))
    assert Cache.open(folder / "my store.kdcache").n_systems == 1
    return folder / "my store.kdcache"


def settings_of(command):
    """Parse a command line as `kd` does, without running it."""
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["kd", "train-student"]
    parsed = dict(root.commands["train-student"].make_context("train-student", words[2:]).params)
    parsed.pop("as_json")
    return resolve(parsed.pop("config_file"), parsed.pop("assignments"), given(parsed))


def config_of(store, *assignments, **flags):
    place = {"store": store, "out": Path("runs/it's one"), "student": "painn-tiny"}
    return resolve(None, assignments, place | flags)


def test_what_a_run_chose_itself_is_said_outright(store):
    """Of `--kd auto` the command names the losses that came of it."""
    config = config_of(store, kd_terms=("n2n=2",))
    chosen = config.model_copy(update={"kd_auto": True})
    assert settings_of(train_command(chosen, Path("runs/it's one"))) == config


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"seed": 3, "label": "it's <b>", "kd_terms": ("n2n=auto", "v2v=1.5")},
        {"steps": 40, "epochs": 3, "batch_size": 4, "lr": 1e-4},
        {"test": (Path("a/hot.extxyz.xz"), Path("cold.db")), "val": Path("val.extxyz")},
        {"test": (Path("a.db"), Path("b.db")), "groups": ("all=a,b",)},
        {"kd_terms": ("n2n:U1+node=1e-05",), "pseudo_labels": True, "teacher": "a b"},
        {"kd_terms": ("n2n=0.5", "v2v=1,loss=huber,delta=0.1"), "kd_head": "mlp", "kd_loss": "mae"},
        {"sets": ("training.schedule.kind=plateau", "training.ema_decay=null")},
        {"sets": ("training.references={8: -1.5}", "model.num_layers=2", "amp=bf16", "val_every=7")},
    ],
)
def test_command_comes_to_the_same_settings(store, case):
    case = dict(case)
    config = config_of(store, *case.pop("sets", ()), **case)
    command = train_command(config, Path("runs/it's one"))
    assert "--config" not in command
    assert settings_of(command) == config


def test_what_the_preset_says_is_left_out(store):
    words = shlex.split(train_command(config_of(store), Path("run")).replace("\\\n", " "))
    assert words[:3] == ["kd", "train-student", str(store)]
    assert words[3:] == ["--student", "painn-tiny", "--kd", "auto", "--out", "runs/it's one"]


def test_what_flags_cannot_say_comes_from_the_run(store, tmp_path):
    named = config_of(store).model_copy(update={"test": {"other name": Path("hot.extxyz")}})
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(named.model_dump(mode="json")))
    command = train_command(named, run)
    assert f"--config {run / 'config.yaml'}" in command
    assert settings_of(command) == named


def test_losses_that_a_run_chose_are_named_beside_its_settings(store, tmp_path):
    """Its config.yaml says kd_auto: in another folder the same settings would choose again."""
    chosen = config_of(store, kd_terms=("grad=3",)).model_copy(
        update={"kd_auto": True, "test": {"other name": Path("hot.extxyz")}}
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(chosen.model_dump(mode="json")))
    command = train_command(chosen, tmp_path)
    assert "--config" in command
    assert settings_of(command) == chosen.model_copy(update={"kd_auto": False})


def test_report_command_parses_back():
    others = {"--scale-file": None, "--energy-key": "E 0"}
    command = report_command(
        [Path("a"), Path("b c")],
        Path("out"),
        teacher="T;rm",
        test=[Path("x.db")],
        groups=["g=x"],
        others=others,
    )
    words = shlex.split(command.replace("\\\n", " "))
    parsed = click.Command.make_context(root.commands["report"], "report", words[2:]).params
    assert words[:2] == ["kd", "report"]
    assert parsed["runs"] == (Path("a"), Path("b c"))
    assert (parsed["out"], parsed["teacher"], parsed["test"], parsed["energy_key"]) == (
        Path("out"), "T;rm", (Path("x.db"),), "E 0",
    )  # fmt: skip

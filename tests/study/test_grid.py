"""Which runs a study stands for, where they lie, and which settings win."""

from pathlib import Path

import pytest
from study_cases import names

from molkd.pipeline.errors import ConfigError
from molkd.pipeline.study.grid import RUNS, cells_of, check_mixed_names, matching, runs_of
from molkd.pipeline.study.preparing import teacher_run

PAIRS = [
    {"teacher": "big", "student": "painn-tiny", "name": "p"},
    {"teacher": "big", "student": "schnet-tiny", "name": "s"},
]
AXES = {"lr": {"low": {"training.lr": 1e-4}, "high": {"training.lr": 1e-2}}}
ALL = {f"{strategy}__{lr}" for strategy in ("none", "n2n", "n2n+v2v") for lr in ("low", "high")}


def runs(study):
    return {run.name: run for run in runs_of(study, cells_of(study), periodic=False)}


def test_pairs_strategies_and_seeds_are_crossed(study):
    found = names(study(pairs=PAIRS, set={"training.batch_size": 4}))
    assert len(found) == 2 * 3 * 2
    assert found[:4] == ["p/none/seed0", "p/n2n/seed0", "p/n2n+v2v/seed0", "s/none/seed0"]
    assert found[6] == "p/none/seed1"  # every line gets a first seed before any gets a second


def test_axes_are_crossed_or_go_side_by_side(study):
    axes = {"lr": AXES["lr"], "batch": {"4": {"training.batch_size": 4}, "8": {"training.batch_size": 8}}}
    crossed = names(study(strategies={"n2n": "n2n"}, settings=axes, seeds=1))
    assert crossed == [f"p/n2n__{lr}__{batch}/seed0" for lr in ("low", "high") for batch in "48"]
    together = names(study(strategies={"n2n": "n2n"}, settings=axes, zip=[["lr", "batch"]], seeds=1))
    assert together == ["p/n2n__low__4/seed0", "p/n2n__high__8/seed0"]


@pytest.mark.parametrize(
    ("filters", "left"),
    [
        ({"only": [{"strategy": "none"}]}, {"none__low", "none__high"}),
        ({"only": [{"strategy": "n2n*", "lr": "low"}]}, {"n2n__low", "n2n+v2v__low"}),
        ({"skip": [{"strategy": ["n2n", "n2n+v2v"], "lr": "high"}]}, ALL - {"n2n__high", "n2n+v2v__high"}),
        (
            {"only": [{"lr": "low"}], "skip": [{"pair": "p", "strategy": "none"}]},
            {"n2n__low", "n2n+v2v__low"},
        ),
        ({"only": [{"lr": "low"}, {"strategy": "none"}]}, ALL - {"n2n__high", "n2n+v2v__high"}),
    ],
)
def test_filters(study, filters, left):
    found = names(study(settings={"lr": AXES["lr"]}, seeds=1, **filters))
    assert {name.split("/")[1] for name in found} == left


def test_seeds_can_be_filtered(study):
    found = names(study(seeds=3, skip=[{"seed": 2, "strategy": "n2n*"}]))
    assert [name for name in found if name.endswith("seed2")] == ["p/none/seed2"]


@pytest.mark.parametrize(
    ("filters", "says"),
    [
        ({"only": [{"strategi": "none"}]}, r"only: strategi: did you mean strategy\?"),
        ({"skip": [{"strategy": "n3n"}]}, r"skip: strategy: n3n fits none; did you mean n2n\?"),
        ({"skip": [{"seed": 7}]}, r"skip: seed: 7 fits none"),
        ({"skip": [{"strategy": "*"}]}, "leave no run"),
    ],
)
def test_filters_that_make_no_sense(study, filters, says):
    with pytest.raises(ConfigError, match=says):
        names(study(**filters))


def test_names_of_labels_are_those_of_all_files(study):
    """What `data` says of the store's files counts for validation and test files, and for teachers."""
    data = {"files": "train.extxyz", "energy_key": "E", "forces_key": "F"}
    trained = {"new": {"train": {"preset": "painn-tiny", "steps": 3}}}
    named = study(data=data, set={"forces_key": "G"}, teachers=trained, pairs=[PAIRS[0] | {"teacher": "new"}])
    assert named.label_keys == {"energy_key": "E", "forces_key": "G"}
    configs = [run.config for run in runs(named).values()]
    configs.append(teacher_run(named, "new", periodic=False).config)
    assert {(config.energy_key, config.forces_key) for config in configs} == {("E", "G")}
    assert study().label_keys == {}


def test_which_setting_wins(study):
    """Preset < steps < study < pair < strategy < axes; each layer sets what the next one overrides."""
    layered = study(
        steps=50,
        set={"training.lr": 1, "training.weight_decay": 1, "training.adam_eps": 1, "val_every": 1},
        pairs=[PAIRS[0] | {"set": {"training.weight_decay": 2, "training.adam_eps": 2, "val_every": 2}}],
        strategies={"n2n": {"kd": "n2n", "set": {"training.adam_eps": 3, "val_every": 3}}},
        settings={"x": {"one": {"val_every": 4}, "short": {"training": {"max_steps": 5}}}},
        seeds=[7],
    )
    found = runs(layered)
    config = found["p/n2n__one/seed7"].config
    training = config.training
    assert (training.lr, training.weight_decay, training.adam_eps, config.val_every) == (1, 2, 3, 4)
    assert (training.max_steps, training.schedule.warmup_steps) == (50, 100)  # of steps; of painn-tiny
    assert training.max_epochs > 50
    assert found["p/n2n__short/seed7"].config.training.max_steps == 5
    assert (config.seed, config.label, config.student, config.teacher) == (7, "n2n__one", "painn-tiny", "big")
    assert config.out == layered.out / RUNS / "p" / "n2n__one" / "seed7"
    assert config.test == layered.test


def test_weights_of_a_pair_fill_in_where_a_strategy_gives_none(study):
    lambdas = {"n2n": 100, "n2n,head=mlp": 7, "v2v": "auto"}
    strategies = {"a": "n2n", "b": "n2n=3", "c": ["n2n,head=mlp", "v2v"], "d": "n2n:U1"}
    found = runs(study(pairs=[PAIRS[0] | {"lambdas": lambdas}], strategies=strategies, seeds=1))
    weights = {name.split("/")[1]: [t.weight for t in run.config.kd] for name, run in found.items()}
    assert weights == {"a": [100], "b": [3], "c": [7, "auto"], "d": ["auto"]}
    assert found["p/c/seed0"].config.kd[0].head == "mlp"


def test_what_is_only_watched_otherwise_is_one_run(study):
    """As reports see it: they would take the second for the same seed given twice."""
    watch = {"watch": {"often": {"log_every": 1}, "rarely": {"log_every": 100, "device": "cpu"}}}
    found = runs(study(strategies={"n2n": "n2n"}, settings=watch, seeds=1))
    assert list(found) == ["p/n2n__often/seed0"]
    assert [cell.choices["watch"] for cell in found["p/n2n__often/seed0"].cells] == ["often", "rarely"]


def test_further_stores_of_one_name(study):
    """Reports name them without their folders, so runs with either would be one group."""

    def mixed(*stores):
        axis = {str(k): {"mix": [{"store": store}]} for k, store in enumerate(stores)}
        return list(runs(study(strategies={"n2n": "n2n"}, settings={"data": axis}, seeds=1)).values())

    check_mixed_names(mixed("a/rattled.kdcache", "a/synthetic.kdcache", "a/rattled.kdcache"))
    with pytest.raises(ConfigError, match=r"a/rattled\.kdcache and .*b/rattled\.kdcache have one name"):
        check_mixed_names(mixed("a/rattled.kdcache", "b/rattled.kdcache"))


def test_heads_and_losses_of_all_terms(study):
    settings = {"head": {"linear": {}, "mlp": {"kd_head": "mlp", "kd_loss": "mae"}}}
    found = runs(study(strategies={"n2n": ["n2n", "vanilla1"]}, settings=settings, seeds=1))
    term = found["p/n2n__mlp/seed0"].config.kd[0]
    assert (term.head, term.loss) == ("mlp", "mae")
    assert found["p/n2n__linear/seed0"].config.kd[0].head == "linear"


def test_what_computes_the_same_is_one_run(study):
    """Without KD neither the head nor the teacher matters: one run counts in all these lines."""
    pairs = [PAIRS[0], {"teacher": "flat", "student": "painn-tiny", "name": "f"}]
    settings = {"head": {"linear": {}, "mlp": {"kd_head": "mlp"}}}
    found = runs(study(pairs=pairs, settings=settings, seeds=1, strategies={"none": [], "n2n": "n2n"}))
    assert set(found) == {
        "p/none__linear/seed0",
        *(f"{pair}/n2n__{head}/seed0" for pair in "pf" for head in ("linear", "mlp")),
    }
    shared = found["p/none__linear/seed0"]
    assert {cell.name for cell in shared.cells} == {f"{p}/none__{h}" for p in "pf" for h in ("linear", "mlp")}
    assert shared.config.teacher is None


def test_a_shared_run_stays_where_it_is(study):
    """If lines change their order, the folder that holds the run already is kept."""
    pairs = [PAIRS[0], {"teacher": "flat", "student": "painn-tiny", "name": "f"}]
    first = study(pairs=pairs, seeds=1, strategies={"none": []})
    folder = first.out / RUNS / "p" / "none" / "seed0"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("step\n")
    assert names(study(pairs=pairs[::-1], seeds=1, strategies={"none": []})) == ["p/none/seed0"]


def test_patterns_on_the_command_line(study):
    found = list(runs(study(settings={"lr": AXES["lr"]})).values())

    def chosen(pattern):
        return {run.name for run in matching(found, pattern)}

    assert len(chosen(None)) == 12
    assert chosen("seed1") == {run.name for run in found if run.name.endswith("seed1")}
    assert chosen("n2n") == {f"p/n2n__{lr}/seed{k}" for lr in ("low", "high") for k in (0, 1)}
    assert chosen("*/none__low/*") == {"p/none__low/seed0", "p/none__low/seed1"}
    with pytest.raises(ConfigError, match=r"--only n3n: fits no run; did you mean n2n"):
        matching(found, "n3n")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"set": {"training.lrr": 1}}, r"p/none: unknown setting training\.lrr; did you mean training\.lr\?"),
        ({"strategies": {"a": "n2m"}}, r"p/a: kd\.0\.name: .*'n2m'"),
        ({"strategies": {"a": ["n2n", "n2n=2"]}}, "p/a: each KD loss can be given once"),
        ({"strategies": {"a": {"kd": "n2n", "set": {"kd_head": "cubic"}}}}, r"p/a: kd\.0\.head"),
    ],
)
def test_settings_that_make_no_sense(study, change, says):
    with pytest.raises(ConfigError, match=says):
        names(study(**change))


def test_paths_of_runs_hold_no_dates(study):
    assert Path(names(study())[0]).parts == ("p", "none", "seed0")

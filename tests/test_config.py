"""Settings: which layer wins, what a misspelt key is told, and that the resolved file says it all."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molkd.pipeline.config import (
    OUTPUT_SIGNALS,
    CacheConfig,
    IngestConfig,
    TrainConfig,
    dump_yaml,
    make_config,
    merged,
    nested,
    parse_assignments,
    parse_kd,
    read_yaml,
)
from molkd.pipeline.distill.settings import resolve
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.ingest import ingest
from molkd.pipeline.models.registry import preset_names

COLL = Path(__file__).parent / "data" / "coll_small.extxyz"
NEEDED = {"store": "s.kdcache", "out": "run", "student": "painn-tiny"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "coll.kdcache"
    ingest(IngestConfig(data=(COLL,), store=path))
    return path


def flags(store, **more):
    return {"store": store, "out": Path("run"), "student": "painn-tiny"} | more


def test_each_layer_wins_over_the_ones_before(store, tmp_path):
    """painn-tiny says 16 systems a batch, the settings' own default is 32."""
    file = tmp_path / "run.yaml"
    file.write_text("training: {batch_size: 5, lr: 0.02}\nseed: 3\n")
    sets, flag = ["training.batch_size=6", "training.lr=0.03"], {"batch_size": 7}

    def batch_size(*arguments):
        return resolve(*arguments).training.batch_size

    assert TrainConfig(**NEEDED).training.batch_size == 32
    assert batch_size(None, [], flags(store)) == 16
    assert batch_size(file, [], flags(store)) == 5
    assert batch_size(file, sets, flags(store)) == 6
    assert batch_size(file, sets, flags(store, **flag)) == 7
    resolved = resolve(file, sets, flags(store, **flag))
    assert (resolved.training.lr, resolved.seed) == (0.03, 3)
    assert resolved.training.schedule.warmup_steps == 100  # of the preset, which nobody touched
    assert resolved.training.adam_eps == 1e-8


def test_a_layer_replaces_single_keys_of_nested_settings(store, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: {hidden_channels: 32}\n")
    config = resolve(file, ["training.schedule.warmup_steps=7"], flags(store))
    assert config.model["hidden_channels"] == 32
    assert config.model["num_layers"] == 3
    assert config.training.schedule.warmup_steps == 7
    assert config.training.schedule.decay_rate == 0.01


def test_flags_have_the_names_of_the_settings_they_set(store, tmp_path):
    given_flags = flags(store, epochs=4, steps=9, lr=0.5, kd_terms=("n2n=3", "v2v"), kd_loss="mae")
    config = resolve(None, [], given_flags | {"test": (Path("a/test.extxyz"), Path("b/hot.extxyz.xz"))})
    training = config.training
    assert (training.max_epochs, training.max_steps, training.lr) == (4, 9, 0.5)
    assert [(t.name, t.weight, t.head, t.loss) for t in config.kd] == [
        ("n2n", 3.0, "linear", "mae"),
        ("v2v", "auto", "linear", "mae"),
    ]
    assert config.test == {"test": Path("a/test.extxyz"), "hot": Path("b/hot.extxyz.xz")}


@pytest.mark.parametrize("seed", [-1, 1.5])
def test_a_seed_is_a_whole_number_from_zero_on(seed):
    with pytest.raises(ConfigError, match="seed"):
        make_config(TrainConfig, NEEDED, {"seed": seed})


def test_two_test_files_of_one_name_are_refused(store):
    with pytest.raises(ConfigError, match="two files of the same name"):
        resolve(None, [], flags(store, test=(Path("a/test.extxyz"), Path("b/test.extxyz"))))


@pytest.mark.parametrize(
    ("layer", "wrong", "nearest"),
    [
        ({"sead": 1}, "sead", "seed"),
        ({"training": {"batchsize": 4}}, "training.batchsize", "training.batch_size"),
        (
            {"training": {"schedule": {"warm_up_steps": 1}}},
            "training.schedule.warm_up_steps",
            "training.schedule.warmup_steps",
        ),
        ({"kd": [{"name": "n2n", "wieght": 1}]}, "kd.0.wieght", "kd.0.weight"),
    ],
)
def test_a_misspelt_key_is_told_the_nearest_valid_one(layer, wrong, nearest):
    with pytest.raises(ConfigError) as error:
        make_config(TrainConfig, NEEDED, layer)
    assert f"unknown setting {wrong}; did you mean {nearest}? valid here: " in str(error.value)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        make_config(TrainConfig, NEEDED, {"sead": 1, "training": {"lr": -1}, "val_fraction": 2})
    assert all(text in str(error.value) for text in ("sead", "training.lr", "found -1", "val_fraction"))


def test_a_misspelt_architecture_setting_and_preset_are_told_too(store):
    with pytest.raises(ConfigError, match="unknown preset 'pain-tiny'; did you mean painn-tiny"):
        resolve(None, [], flags(store, student="pain-tiny"))


def test_assignments_are_read_as_yaml_and_numbers_with_exponents():
    parsed = parse_assignments(
        ["training.lr=1e-3", "training.ema_decay=null", "kd=[]", "label=a=b", "seed=4"]
    )
    assert parsed == {
        "training": {"lr": 1e-3, "ema_decay": None},
        "kd": [],
        "label": "a=b",
        "seed": 4,
    }
    with pytest.raises(ConfigError, match="write it as key=value"):
        parse_assignments(["training.lr"])


def test_kd_texts():
    assert parse_kd(["none"]) == []
    assert [(t["name"], t["weight"]) for t in parse_kd(["n2n=1e4", "vanilla2"])] == [
        ("n2n", 10_000.0),
        ("vanilla2", "auto"),
    ]
    with pytest.raises(ConfigError, match="cannot be combined"):
        parse_kd(["none", "n2n=1"])


@pytest.mark.parametrize(
    ("text", "label", "teacher", "student", "weight"),
    [
        ("n2n", "n2n", "node", ("node",), "auto"),
        ("n2n:U4", "n2n:U4", "node", ("layer/U4",), "auto"),
        ("n2n:H3->U4=10", "n2n:H3->U4", "layer/H3", ("layer/U4",), 10.0),
        ("n2n:H3->U2+U4=auto", "n2n:H3->U2+U4", "layer/H3", ("layer/U2", "layer/U4"), "auto"),
        ("n2n:layer/H3->node", "n2n:H3->node", "layer/H3", ("node",), "auto"),
        ("n2n:node->node=1", "n2n", "node", ("node",), 1.0),
        ("e2n", "e2n", "e2n", ("node",), "auto"),
        ("e2n:U4=3", "e2n:U4", "e2n", ("layer/U4",), 3.0),
        ("e2n:e2n", "e2n:e2n", "e2n", ("e2n",), "auto"),
        ("v2v=2", "v2v", "v2v", ("v2v",), 2.0),
        ("v2v:UV4=2", "v2v:UV4", "v2v", ("layer/UV4",), 2.0),
        ("v2v:MV1->UV2+v2v", "v2v:MV1->UV2+v2v", "layer/MV1", ("layer/UV2", "v2v"), "auto"),
        ("n2n=10,loss=huber", "n2n,loss=huber", "node", ("node",), 10.0),
        ("n2n:H3->U4,head=mlp", "n2n:H3->U4,head=mlp", "layer/H3", ("layer/U4",), "auto"),
        (
            "e2n=1,delta=0.5,loss=huber,head=identity",
            "e2n,head=identity,loss=huber,delta=0.5",
            "e2n",
            ("node",),
            1.0,
        ),
        ("n2n,loss=mse,head=linear", "n2n", "node", ("node",), "auto"),
        ("e2e:edge->edge", "e2e", "edge", ("edge",), "auto"),
        ("vanilla2", "vanilla2", "", (), "auto"),
    ],
)
def test_taps_are_written_short_and_kept_in_full(text, label, teacher, student, weight):
    (term,) = make_config(TrainConfig, NEEDED, {"kd": parse_kd([text])}).kd
    assert (term.label, term.teacher_tap, term.student_taps, term.weight) == (label, teacher, student, weight)
    again = make_config(TrainConfig, NEEDED, {"kd": parse_kd([term.label])}).kd[0]
    assert again.model_dump(exclude={"weight"}) == term.model_dump(exclude={"weight"})


def test_a_term_written_out_is_read_back_as_it_is():
    texts = [
        "n2n:H3->U2+U4=0.123456789,head=mlp,loss=huber,delta=0.001",
        "v2v=1e-12,loss=mae",
        "vanilla1=auto",
    ]
    terms = make_config(TrainConfig, NEEDED, {"kd": parse_kd(texts)}).kd
    assert make_config(TrainConfig, NEEDED, {"kd": parse_kd([term.text for term in terms])}).kd == terms


def test_a_term_chooses_for_itself_what_the_flags_choose_for_all():
    terms = parse_kd(["n2n", "n2n,loss=mse", "v2v,head=identity", "e2n,delta=2"], head="mlp", loss="huber")
    chosen = [(t["name"], t["head"], t["loss"], t.get("delta")) for t in terms]
    assert chosen == [
        ("n2n", "mlp", "huber", None),
        ("n2n", "mlp", "mse", None),
        ("v2v", "identity", "huber", None),
        ("e2n", "mlp", "huber", 2.0),
    ]
    assert len(make_config(TrainConfig, NEEDED, {"kd": terms}).kd) == 4  # one loss twice, in two ways


def test_flags_for_all_terms_pass_losses_on_outputs_by():
    terms = parse_kd(["grad", "vanilla1", "n2n"], head="mlp", loss="mae")
    assert [(t["name"], t.get("head"), t.get("loss")) for t in terms] == [
        ("grad", None, None), ("vanilla1", None, None), ("n2n", "mlp", "mae"),
    ]  # fmt: skip


def test_settings_written_before_there_were_taps_load(tmp_path):
    old = "kd:\n- {name: v2v, weight: 2.0, head: linear, loss: mse}\n- {name: n2n}\n"
    (tmp_path / "old.yaml").write_text(old)
    terms = make_config(TrainConfig, NEEDED, read_yaml(tmp_path / "old.yaml")).kd
    assert [term.label for term in terms] == ["v2v", "n2n"]


@pytest.mark.parametrize(
    ("kd", "message"),
    [
        (["n2n=1", "n2n=2"], "each KD loss can be given once"),
        (
            ["n2n:U4=1", "n2n:node->U4=2"],
            "each KD loss can be given once, or with another head, loss or taps",
        ),
        (["v2v:node"], "node is no vector feature of atoms; take v2v or layers of vectors, as in v2v:UV4"),
        (["v2v:node->v2v"], "v2v its v2v or a layer of vectors"),
        (["n2n=1,loss=huber", "n2n=2,loss=huber"], "given once, or with another head, loss or taps"),
        (["n2n=1,huber"], "'huber' is no choice; after the weight stand head, loss, delta, fade, each once"),
        (["n2n,head=mlp,head=linear"], "'head=linear' is no choice"),
        (["n2n,weight=1"], "'weight=1' is no choice"),
        (["n2n,loss="], "'loss=' is no choice"),
        (["n2n,loss=square"], "'mse', 'mae'"),
        (["n2n,head=deep"], "'identity', 'linear' or 'mlp'"),
        (["v2v,loss=cka"], "atoms of different systems, and each may turn alone; take gsp or lsp"),
        (["e2e,loss=lsp"], "loss lsp compares atoms, e2e takes mse, mae or huber"),
        (["n2n,loss=gsp,delta=2"], "delta goes with loss huber"),
        (["n2n,delta=2"], "delta goes with loss huber"),
        (["n2n,loss=huber,delta=0"], "positive and finite"),
        (["n2n,loss=huber,delta=inf"], "positive and finite"),
        (["n2n,loss=huber,delta=x"], "delta"),
        (["v2v,head=mlp"], "an MLP on vector components is not equivariant"),
        (["vanilla1,loss=mae"], "vanilla1 takes neither head nor loss, it compares outputs"),
        (["e2e:H1->edge"], "e2e takes no taps"),
        (["vanilla1:U4"], "vanilla1 takes no taps"),
        (["n2n:U4+U4"], "n2n:U4.U4 names a tap of the student twice"),
        (["e2n:H3->U4"], "e2n learns the teacher's e2n, .* write n2n:H3->U4 for a layer"),
        (["n2n:v2v->node"], "e2n learns the teacher's e2n, n2n its node or a layer"),
        (["n2n:v2v"], "v2v is no scalar feature of atoms"),
        (["n2n:H3-"], "quote what holds ->"),  # what a shell leaves of n2n:H3->U4
        (["n2n:"], "a tap is missing"),
        (["n2n:->U4"], "a tap is missing"),
        (["n2n:U4+"], "a tap is missing"),
        (["n2n:H3->U4=x"], "the weight is a number, auto or balance, for example n2n:H3->U4=1.0"),
        (["n2n=0"], "the weight must be positive"),
        (["n2n=nan"], "positive and finite"),
        (["n2n=inf"], "positive and finite"),
        (["n2n=much"], "weight"),
        (["n2e=1"], "'n2n', 'e2n', 'v2v', 'e2e', 'vanilla1', 'vanilla2' or 'grad'"),
    ],
)
def test_kd_terms_that_make_no_sense_are_refused(kd, message):
    with pytest.raises(ConfigError, match=message):
        make_config(TrainConfig, NEEDED, {"kd": parse_kd(kd)})


def test_cka_goes_with_several_stores_that_weigh_alike():
    mixed = NEEDED | {"mix": [{"store": "b.kdcache", "share": 0.5, "weight": 1.0}]}
    assert make_config(TrainConfig, mixed, {"kd": parse_kd(["n2n,loss=cka"])}).mix
    mixed["mix"][0]["weight"] = 0.5
    of_outputs = parse_kd(["n2n,loss=mse", "vanilla1"], loss="cka")  # the flag means nothing to vanilla1
    assert make_config(TrainConfig, mixed, {"kd": of_outputs}).mix
    with pytest.raises(ConfigError, match="cka cannot weigh systems by origin; take mix weight 1"):
        make_config(TrainConfig, mixed, {"kd": parse_kd(["n2n,loss=cka"])})


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [\n", "just text"])
def test_a_file_that_holds_no_settings_is_named(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml: "):
        read_yaml(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        read_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize("preset", preset_names())
def test_presets_resolve_and_load_back_to_themselves(store, tmp_path, preset):
    config = resolve(None, [], flags(store, student=preset, kd_terms=("n2n=auto",)))
    assert load_back(config, tmp_path) == config


def load_back(config, folder):
    file = folder / "config.yaml"
    file.write_text(dump_yaml(config))
    return make_config(type(config), read_yaml(file))


positive = st.floats(1e-12, 1e12)
names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=20)
paths = st.lists(st.sampled_from(["a", "b c", "ä", "1e3", "null"]), min_size=1, max_size=3).map(
    lambda parts: Path(*parts)
)
taps = st.sampled_from(["node", "e2n", "layer/U1", "U1", "layer/a/b", "H3"])
shares = st.lists(st.floats(0, 1), min_size=2, max_size=2).map(sorted)


def terms_of(name):
    """Everything that a term of this name may say."""
    needed = {"name": st.just(name), "weight": st.one_of(st.sampled_from(["auto", "balance"]), positive)}
    if name in OUTPUT_SIGNALS:
        return st.fixed_dictionaries(needed, optional={"fade": shares})
    needed["head"] = st.sampled_from(["identity", "linear"] + ["mlp"] * (name != "v2v"))
    of_relations = ["cka", "gsp", "lsp"] * (name in ("n2n", "e2n"))
    needed["loss"] = st.sampled_from(["mse", "mae", "huber", *of_relations])
    of_taps = {
        "teacher_tap": st.sampled_from(["node", "layer/H3", "H3"]),
        "student_taps": st.lists(taps, min_size=1, max_size=3, unique_by=lambda t: t.split("/")[-1]),
    }
    return st.fixed_dictionaries(needed, optional={"fade": shares} | (of_taps if name == "n2n" else {}))


terms = st.sampled_from(["n2n", "e2n", "v2v", "e2e", *OUTPUT_SIGNALS]).flatmap(terms_of)
schedules = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.sampled_from(["warmup_exponential", "warmup_milestones", "constant"]),
        "warmup_steps": st.integers(0, 10**7),
        "decay_steps": st.none() | st.integers(1, 10**7),
        "milestones": st.lists(st.integers(0, 10**7), max_size=3),
        "gamma": st.floats(1e-3, 1),
    },
)
trainings = st.fixed_dictionaries(
    {},
    optional={
        "lr": positive,
        "weight_decay": st.floats(0, 1),
        "ema_decay": st.none() | st.floats(0, 0.9999),
        "clip_grad_norm": st.none() | positive,
        "references": st.sampled_from(["fit", "none"])
        | st.dictionaries(st.integers(1, 83), st.floats(-1e5, 1e5), max_size=3),
        "max_steps": st.none() | st.integers(1, 10**9),
        "schedule": schedules,
    },
)
train_configs = st.fixed_dictionaries(
    {"store": paths, "out": paths, "student": names},
    optional={
        "training": trainings,
        "kd": st.lists(terms, max_size=4, unique_by=lambda term: term["name"]),
        "teacher": st.none() | names,
        "val": st.none() | paths,
        "test": st.dictionaries(names, paths, max_size=2),
        "seed": st.integers(0, 2**63),
        "label": names,
        "model": st.dictionaries(names, st.none() | st.integers() | positive | names | st.booleans()),
    },
)


@given(values=train_configs)
def test_any_resolved_file_loads_back_to_itself(values, tmp_path_factory):
    config = make_config(TrainConfig, values)
    assert load_back(config, tmp_path_factory.getbasetemp()) == config


@given(
    values=st.fixed_dictionaries(
        {"store": paths, "teacher": names}, optional={"signals": st.lists(names, min_size=1, max_size=3)}
    )
)
def test_settings_of_stage_one_load_back_too(values, tmp_path_factory):
    config = make_config(CacheConfig, values)
    assert load_back(config, tmp_path_factory.getbasetemp()) == config


def test_keys_with_dots_and_nested_mappings_say_the_same():
    dotted = {"training.lr": "1e-3", "training.schedule.kind": "constant", "seed": 2}
    assert nested(dotted) == {"training": {"lr": 1e-3, "schedule": {"kind": "constant"}}, "seed": 2}
    assert nested({"training.lr": 1, "training": {"batch_size": 2}}) == {
        "training": {"lr": 1, "batch_size": 2}
    }
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}, {"d": 4}) == {"a": {"b": 1, "c": 3}, "d": 4}

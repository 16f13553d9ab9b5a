"""Heads: widths, equivariance, and pairs of student and teacher that are refused."""

import pytest
import torch
from distill_cases import MODELS

from molkd.cache_schema.fields import (
    atomic_energies_spec,
    e2n_spec,
    edge_spec,
    energy_spec,
    forces_spec,
    node_spec,
    v2v_spec,
)
from molkd.pipeline.config import KDTerm, make_config, parse_kd
from molkd.pipeline.distill.heads import LinearHead, MLPHead, make_head, make_heads
from molkd.pipeline.distill.objective import Objective, needed_signals
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.models.registry import build_model

ROTATION_NOISE = 1e-5  # float32 sums of 16 terms of order one

PAINN = build_model(MODELS["painn-direct"]).signals
SCHNET = build_model(MODELS["schnet"]).signals
TEACHER = {
    s.name: s for s in (energy_spec(), forces_spec(), atomic_energies_spec(), node_spec(24), v2v_spec(24))
}


def rotation() -> torch.Tensor:
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))
    return q * torch.sign(torch.linalg.det(q))


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_scalar_heads_reach_the_teachers_width(head):
    module = make_head(KDTerm(name="n2n", head=head), PAINN, TEACHER)
    assert module(torch.randn(5, 16)).shape == (5, 24)
    assert isinstance(module, LinearHead if head == "linear" else MLPHead)


def test_linear_head_of_scalars_is_affine():
    module = make_head(KDTerm(name="n2n"), PAINN, TEACHER)
    x = torch.randn(5, 16)
    torch.testing.assert_close(module(x), x @ module.linear.weight.T + module.linear.bias)


def test_identity_head_needs_and_keeps_equal_widths():
    same = {"node": node_spec(16)}
    x = torch.randn(5, 16)
    assert torch.equal(make_head(KDTerm(name="n2n", head="identity"), PAINN, same)(x), x)
    with pytest.raises(ConfigError, match=r"equal widths, student 16, teacher 24; take head linear"):
        make_head(KDTerm(name="n2n", head="identity"), PAINN, TEACHER)


@pytest.mark.parametrize("loss", ["cka", "gsp", "lsp"])
def test_relations_between_atoms_need_no_equal_widths(loss):
    x = torch.randn(5, 16)
    assert torch.equal(make_head(KDTerm(name="n2n", head="identity", loss=loss), PAINN, TEACHER)(x), x)
    assert make_head(KDTerm(name="n2n", loss=loss), PAINN, TEACHER)(x).shape == (5, 24)


def test_vector_head_turns_with_its_input_and_has_no_bias():
    module = make_head(KDTerm(name="v2v"), PAINN, TEACHER)
    assert [name for name, _ in module.named_parameters()] == ["linear.weight"]
    vectors, R = torch.randn(5, 3, 16), rotation()
    turn = lambda v: torch.einsum("ij,njc->nic", R, v)  # noqa: E731
    mapped = module(vectors)
    assert mapped.shape == (5, 3, 24)
    torch.testing.assert_close(module(turn(vectors)), turn(mapped), rtol=ROTATION_NOISE, atol=ROTATION_NOISE)
    assert (module(torch.zeros(2, 3, 16)) == 0).all()


def test_an_mlp_on_vectors_is_refused():
    with pytest.raises(ConfigError, match="MLP on vector components is not equivariant"):
        make_config(KDTerm, {"name": "v2v", "head": "mlp"})


@pytest.mark.parametrize("choice", [{"loss": "huber"}, {"head": "mlp"}])
def test_losses_on_outputs_take_neither_head_nor_loss(choice):
    """From a file of settings; reports still read it."""
    with pytest.raises(ConfigError, match="kd: vanilla1 takes neither head nor loss"):
        make_head(KDTerm(name="vanilla1", **choice), PAINN, TEACHER)


def test_one_head_flag_for_all_terms_leaves_vectors_linear():
    terms = parse_kd(["n2n=10", "v2v=auto"], head="mlp", loss="mae")
    assert [(t["name"], t["head"], t["loss"], t["weight"]) for t in terms] == [
        ("n2n", "mlp", "mae", 10.0),
        ("v2v", "linear", "mae", "auto"),
    ]


@pytest.mark.parametrize(
    ("term", "signal"),
    [
        ("n2n", "node"),
        ("e2n", "e2n"),
        ("v2v", "v2v"),
        ("e2e", "edge"),
        ("vanilla1", "forces"),
        ("vanilla2", "atomic_energies"),
    ],
)
def test_a_signal_that_is_not_cached_is_named_with_the_command_that_adds_it(term, signal):
    cached = {name: spec for name, spec in TEACHER.items() if name != signal}
    with pytest.raises(ConfigError) as error:
        make_head(KDTerm(name=term), PAINN | {"edge": edge_spec(16)}, cached)
    message = str(error.value)
    assert f"--kd {term} needs the teacher's signal {signal}" in message
    assert ", ".join(sorted(cached)) in message
    assert f"kd cache-teacher again with --signals {signal}" in message


@pytest.mark.parametrize(("term", "what"), [("v2v", "vector features"), ("e2e", "features of edges")])
def test_a_student_without_such_features_cannot_learn_them(term, what):
    with pytest.raises(ConfigError, match=rf"--kd {term} needs {what}, this student has none; take n2n"):
        make_head(KDTerm(name=term), SCHNET, TEACHER)


def test_layers_of_teacher_and_student_choose_the_widths():
    """PaiNN's blocks are 16 wide; the teacher's H3 is 40 wide."""
    teacher = TEACHER | {"layer/H3": node_spec(40, "layer/H3"), "e2n": e2n_spec(7)}
    shapes = {
        "n2n:M1": (16, 24),
        "n2n:U1+M2": (32, 24),
        "n2n:H3->U2": (16, 40),
        "n2n:H3->node+U1+U2": (48, 40),
        "e2n": (16, 7),
        "e2n:U1+U2": (32, 7),
    }
    for text, (n_in, n_out) in shapes.items():
        module = make_head(KDTerm(**parse_kd([text])[0]), PAINN, teacher)
        assert module(torch.randn(5, n_in)).shape == (5, n_out), text
        assert module.linear.bias is not None


def test_layers_of_vectors_choose_the_widths_of_v2v():
    teacher = TEACHER | {"layer/MV3": v2v_spec(40, "layer/MV3")}
    R = rotation()
    for text, n_in, n_out in (("v2v:UV1", 16, 24), ("v2v:MV1+v2v", 32, 24), ("v2v:MV3->UV1+UV2", 32, 40)):
        module = make_head(KDTerm(**parse_kd([text])[0]), PAINN, teacher)
        vectors = torch.randn(5, 3, n_in)
        mapped = module(vectors)
        assert mapped.shape == (5, 3, n_out), text
        turned, expected = module(R @ vectors), R @ mapped
        torch.testing.assert_close(turned, expected, rtol=0, atol=ROTATION_NOISE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "v2v:U1",
            "student has no vector features U1; did you mean .*V1.*valid taps: MV1, MV2, UV1, UV2, v2v",
        ),
        ("n2n:UV1", "the student has no scalar features UV1; did you mean U1"),
        ("v2v:H3->UV1", "v2v learns vector features, and the teacher's H3 is invariant"),
        ("n2n:MV3->U1", "n2n learns scalar features, and the teacher's MV3 is vector"),
    ],
)
def test_scalars_and_vectors_are_not_compared(text, message):
    teacher = TEACHER | {"layer/H3": node_spec(40, "layer/H3"), "layer/MV3": v2v_spec(40, "layer/MV3")}
    with pytest.raises(ConfigError, match=message):
        make_head(KDTerm(**parse_kd([text])[0]), PAINN, teacher)


def test_a_head_of_edges_is_affine():
    student, teacher = PAINN | {"edge": edge_spec(16)}, TEACHER | {"edge": edge_spec(40)}
    module = make_head(KDTerm(name="e2e"), student, teacher)
    assert module(torch.randn(7, 16)).shape == (7, 40)
    assert (module(torch.zeros(1, 16)) == module.linear.bias).all()


def test_a_tap_that_the_student_does_not_have_is_told_the_nearest_and_all():
    with pytest.raises(ConfigError) as error:
        make_head(KDTerm(**parse_kd(["n2n:U9"])[0]), PAINN, TEACHER)
    assert "--kd n2n:U9: the student has no scalar features U9; did you mean U2?" in str(error.value)
    assert "valid taps: M1, M2, U1, U2, node" in str(error.value)


def test_a_tap_that_the_teacher_does_not_have_is_told_the_nearest_and_all():
    offered = ("node", "v2v", "atomic_energies", "layer/H0", "layer/H1")
    with pytest.raises(ConfigError) as error:
        make_head(KDTerm(**parse_kd(["n2n:H7->U2"])[0]), PAINN, TEACHER, offered)
    assert "--kd n2n:H7->U2: the teacher gives no layer/H7; it gives " in str(error.value)
    assert "atomic_energies, layer/H0, layer/H1, node, v2v; did you mean layer/H1?" in str(error.value)
    with pytest.raises(ConfigError, match=r"run kd cache-teacher again with --signals layer/H1 "):
        make_head(KDTerm(**parse_kd(["n2n:H1->U2"])[0]), PAINN, TEACHER, offered)
    with pytest.raises(ConfigError, match="the teacher gives no e2n"):
        make_head(KDTerm(name="e2n"), PAINN, TEACHER, offered)


def test_the_student_is_asked_for_the_taps_of_all_terms_and_nothing_else():
    def taps(*texts):
        terms = tuple(KDTerm(**term) for term in parse_kd(texts))
        teacher = TEACHER | {"e2n": e2n_spec(7)}
        heads = make_heads(terms, PAINN, teacher)
        return Objective(terms, {t.label: 1.0 for t in terms}, heads, 1.0, 1.0).taps

    assert taps() == taps("vanilla1", "vanilla2") == ()
    assert taps("n2n", "v2v") == ("node", "v2v")
    assert taps("n2n:U1+M2", "e2n:U1") == ("layer/M2", "layer/U1")


def test_a_run_reads_no_more_signals_than_its_losses_need():
    n2n, vanilla = KDTerm(name="n2n"), KDTerm(name="vanilla1")
    assert needed_signals((), pseudo_labels=False) == ()
    assert needed_signals((n2n,), pseudo_labels=False) == ("node",)
    assert needed_signals((n2n, vanilla), pseudo_labels=False) == ("energy", "forces", "node")
    assert needed_signals((n2n,), pseudo_labels=True) == ("energy", "forces", "node")
    layer = KDTerm(name="n2n", teacher_tap="H3", student_taps=("U1", "U2"))
    assert needed_signals((n2n, layer, KDTerm(name="e2e")), pseudo_labels=False) == (
        "edge",
        "layer/H3",
        "node",
    )

"""CKA, GSP and LSP against independent computations, numbers worked out by hand, and their invariances."""

import math

import numpy as np
import pytest
import torch
from distill_cases import spread_weights

from molkd.cache_schema.fields import node_spec, v2v_spec
from molkd.pipeline.config import KDTerm, parse_kd
from molkd.pipeline.distill import feature_losses
from molkd.pipeline.distill.feature_losses import cka_loss, gsp_loss, lsp_loss, structure_loss
from molkd.pipeline.distill.heads import make_heads
from molkd.pipeline.distill.losses import Targets
from molkd.pipeline.distill.objective import Objective
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.graphs.batch import make_batch

FLOAT32 = 2e-5  # relative; sums of a few hundred float32 products, and differences of them
ROUNDING = 1e-7  # of a float32 sum of logarithms near one
KINDS = ("cka", "gsp", "lsp")


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthogonal(n, seed=0, dtype=torch.float32):
    q, _ = torch.linalg.qr(random(n, n, seed=seed, dtype=torch.float64))
    return q.to(dtype)


def batch_of(n_atoms, edges):
    """A batch of systems with these numbers of atoms and edges (sender, receiver), sorted as batches are."""
    total = sum(n_atoms)
    index = np.array(sorted(edges, key=lambda e: (e[1], e[0])), np.int64).reshape(-1, 2).T
    return make_batch(
        atomic_numbers=np.ones(total, np.int64),
        positions=np.zeros((total, 3)),
        n_atoms=np.array(n_atoms),
        cell=np.zeros((len(n_atoms), 3, 3)),
        pbc=np.zeros((len(n_atoms), 3), bool),
        tags=np.zeros(total, np.int64),
        fixed=np.zeros(total, bool),
        rule=(index, np.zeros((index.shape[1], 3), np.int64)),
    )


def everyone(first, n):
    """All ordered pairs of n atoms, of which the first has number `first`."""
    return [(first + i, first + j) for i in range(n) for j in range(n) if i != j]


TWO = batch_of([3, 4], everyone(0, 3) + everyone(3, 4))


def unbiased_cka(x, y):
    """Song et al. 2012 by U-centered n x n matrices, in float64."""

    def centered(features):
        gram = features.double() @ features.double().T
        gram.fill_diagonal_(0)
        n, rows = len(gram), gram.sum(1)
        gram -= (rows[:, None] + rows[None]) / (n - 2) - rows.sum() / ((n - 1) * (n - 2))
        return gram.fill_diagonal_(0)

    k, m = centered(x), centered(y)
    return ((k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt()).item()


@pytest.mark.parametrize(("n", "widths"), [(4, (3, 5)), (50, (16, 8)), (300, (4, 24))])
def test_cka_is_that_of_a_full_computation(n, widths):
    x, y = random(n, widths[0]), random(n, widths[1], seed=1)
    y = y + x @ random(widths[0], widths[1], seed=2)  # related
    assert 1 - cka_loss(x, y).item() == pytest.approx(unbiased_cka(x, y), abs=FLOAT32)


def test_cka_of_many_rows_is_the_textbook_one():
    """Kornblith et al. 2019, |Y'X|^2 / (|X'X| |Y'Y|) of centered features; its bias falls with 1 / n."""
    x = random(20_000, 6)
    y = x @ random(6, 4, seed=1) + random(20_000, 4, seed=2)
    a, b = (f.double() - f.double().mean(0) for f in (x, y))
    textbook = (b.T @ a).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())
    assert 1 - cka_loss(x, y).item() == pytest.approx(textbook.item(), abs=5e-4)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_cka_sees_neither_rotation_nor_scale_nor_offset_of_the_channels(size):
    teacher, student = random(60, 12), random(60, 12, seed=1)
    turned = size * (teacher @ orthogonal(12)) + 3 * size
    assert cka_loss(turned, teacher).item() == pytest.approx(0, abs=FLOAT32)
    related = student + teacher
    expected = cka_loss(related, teacher).item()
    assert cka_loss(size * related, teacher).item() == pytest.approx(expected, abs=FLOAT32)
    stretched = related @ torch.diag(torch.arange(1.0, 13))
    assert cka_loss(stretched, teacher).item() > expected + 0.01


def test_cka_of_unrelated_features_is_zero_on_average_however_few_rows():
    """The start value of lambda = auto: the loss is 1, where a biased estimate would give 0.3."""
    losses = [cka_loss(random(8, 32, seed=s), random(8, 32, seed=1000 + s)).item() for s in range(400)]
    assert np.mean(losses) == pytest.approx(1, abs=4 * np.std(losses) / 20)
    assert np.std(losses) < 1


@pytest.mark.parametrize("n", [0, 1, 3])
def test_fewer_than_four_atoms_have_no_cka(n):
    x = random(n, 5).requires_grad_()
    loss = cka_loss(x, random(n, 6, seed=1))
    loss.backward()
    assert loss.item() == 0
    assert (x.grad == 0).all()


def test_gsp_by_hand():
    """Squared distances over 2 channels 1/2, 4/2, 5/2, the teacher's over one 1, 9, 4; one atom alone."""
    student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [7.0, 7.0]])
    teacher = torch.tensor([[0.0], [1.0], [3.0], [5.0]])
    first = 2 * (0.5**2 + 7.0**2 + 1.5**2) / 9  # 3 x 3 pairs, each twice, three of an atom with itself
    system_idx = torch.tensor([0, 0, 0, 1])
    assert gsp_loss(student, teacher, system_idx, 2).item() == pytest.approx(first / 2)
    weights = torch.tensor([0.5, 9.0])
    assert gsp_loss(student, teacher, system_idx, 2, weights).item() == pytest.approx(0.5 * first / 2)


def test_gsp_gradient_by_hand():
    """Two atoms at x and 0, teacher at distance d: L = (x^2 - d^2)^2 / 2, dL/dx = 2 x (x^2 - d^2)."""
    x = torch.tensor([[3.0], [0.0]], requires_grad=True)
    gsp_loss(x, torch.tensor([[2.0], [0.0]]), torch.tensor([0, 0]), 1).backward()
    assert x.grad.flatten().tolist() == pytest.approx([30.0, -30.0])


def test_lsp_by_hand():
    """Atom 0 has neighbors 1 and 2 at distances 3 and 4 (teacher 0 and log 3); atoms 1 and 2 have one."""
    student = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    teacher = torch.tensor([[0.0], [0.0], [math.log(3)]])
    edge_index = torch.tensor([[1, 2, 0, 0], [0, 0, 1, 2]])
    share = [1 / (1 + math.e), math.e / (1 + math.e)]  # softmax of 3 and 4; the teacher's is 1/4, 3/4
    expected = (0.25 * math.log(0.25 / share[0]) + 0.75 * math.log(0.75 / share[1])) / 3
    assert lsp_loss(student, teacher, edge_index).item() == pytest.approx(expected, abs=ROUNDING)
    weighted = lsp_loss(student, teacher, edge_index, torch.tensor([2.0, 9.0, 9.0]))
    assert weighted.item() == pytest.approx(2 * expected, abs=ROUNDING)


def test_a_share_of_a_thousand_neighbors_stays_finite():
    """Distances up to 500, whose exponentials overflow float32."""
    n = 1001
    edge_index = torch.stack([torch.arange(1, n), torch.zeros(n - 1, dtype=torch.long)])
    x = torch.linspace(0, 500, n)[:, None].requires_grad_()
    loss = lsp_loss(x, torch.zeros(n, 1), edge_index)
    loss.backward()
    log_share = torch.log_softmax(torch.linspace(0, 500, n)[1:].double(), 0)
    expected = -(math.log(1000) + log_share.mean().item()) / n
    assert loss.item() == pytest.approx(expected, rel=FLOAT32)
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_features_cost_nothing_and_other_widths_are_welcome(kind):
    x, y = random(7, 6), random(7, 9, seed=1)
    assert structure_loss(kind, x, x.clone(), TWO).item() == pytest.approx(0, abs=1e-6)
    padded = torch.cat([x @ orthogonal(6), torch.zeros(7, 3)], dim=1)  # 9 wide, the same distances
    target = x if kind == "lsp" else x * (1 if kind == "cka" else math.sqrt(6 / 9))  # gsp: mean over channels
    assert structure_loss(kind, padded, target, TWO).item() == pytest.approx(0, abs=1e-5)
    assert structure_loss(kind, x, y, TWO).item() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_atoms_does_not_matter(kind):
    x, y = random(7, 6), random(7, 9, seed=1)
    order = torch.tensor([2, 0, 1, 6, 3, 5, 4])  # within each system
    edges = [(int((order == i).nonzero()), int((order == j).nonzero())) for i, j in TWO.edge_index.T]
    shuffled = batch_of([3, 4], edges)
    found = structure_loss(kind, x[order], y[order], shuffled).item()
    assert found == pytest.approx(structure_loss(kind, x, y, TWO).item(), rel=FLOAT32)


@pytest.mark.parametrize("kind", ["gsp", "lsp"])
def test_each_system_may_turn_by_itself(kind):
    """Of student and teacher alike, each as it likes: only what is within a system is compared."""
    x, y = random(7, 3, 6), random(7, 3, 9, seed=1)

    def turned(features, seed):
        return torch.cat([orthogonal(3, seed + s) @ part for s, part in enumerate(features.split([3, 4]))])

    expected = structure_loss(kind, x, y, TWO).item()
    for features in ((turned(x, 0), turned(y, 5)), (x.flatten(1), y.flatten(1))):
        assert structure_loss(kind, *features, TWO).item() == pytest.approx(expected, rel=FLOAT32)


def test_systems_of_a_batch_do_not_see_each_other():
    """GSP is the mean over systems, LSP that over atoms; offsets between systems change nothing."""
    x, y = random(7, 6), random(7, 9, seed=1)
    x[3:] += 100.0
    parts = ((x[:3], y[:3], batch_of([3], everyone(0, 3))), (x[3:], y[3:], batch_of([4], everyone(0, 4))))
    for kind, shares in (("gsp", (1 / 2, 1 / 2)), ("lsp", (3 / 7, 4 / 7))):
        alone = [structure_loss(kind, *part).item() for part in parts]
        expected = sum(share * loss for share, loss in zip(shares, alone, strict=True))
        assert structure_loss(kind, x, y, TWO).item() == pytest.approx(expected, rel=FLOAT32), kind


def test_weights_of_systems_weigh_gsp_and_lsp():
    x, y = random(7, 6), random(7, 9, seed=1)
    first = spread_weights(torch.tensor([1.0, 0.0]), torch.tensor([3, 4]))
    second = spread_weights(torch.tensor([0.0, 1.0]), torch.tensor([3, 4]))
    for kind in ("gsp", "lsp"):
        parts = [structure_loss(kind, x, y, TWO, weights).item() for weights in (first, second)]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(structure_loss(kind, x, y, TWO).item(), rel=FLOAT32), kind


def test_cka_weighs_no_systems():
    weights = spread_weights(torch.tensor([1.0, 2.0]), torch.tensor([3, 4]))
    with pytest.raises(ConfigError, match="cannot weigh systems by origin"):
        structure_loss("cka", random(7, 6), random(7, 9), TWO, weights)


def test_gsp_in_blocks_of_rows_is_the_same_with_the_same_gradient(monkeypatch):
    idx = torch.arange(40) // 7  # 6 systems, of 7 atoms and one of 5
    y = random(40, 9, seed=1)
    results = []
    for pairs in (2**24, 40 * 6, 1):
        monkeypatch.setattr(feature_losses, "_MAX_PAIRS", pairs)
        x = random(40, 6).requires_grad_()
        loss = gsp_loss(x, y, idx, 6)
        loss.backward()
        results.append((loss.detach(), x.grad))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=FLOAT32, atol=0)
        torch.testing.assert_close(gradient, results[0][1], rtol=FLOAT32, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    """In float64; `structure_loss` itself computes in float32."""
    idx, edges = TWO.system_idx, TWO.edge_index
    functions = {
        "cka": cka_loss,
        "gsp": lambda a, b: gsp_loss(a, b, idx, 2),
        "lsp": lambda a, b: lsp_loss(a, b, edges),
    }
    x = random(7, 5, dtype=torch.float64).requires_grad_()
    y = random(7, 4, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: functions[kind](a, y), (x,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n_atoms", "edges"),
    [
        ([5], everyone(0, 5)),
        ([1], []),
        ([1], [(0, 0), (0, 0)]),  # its own periodic images
        ([1, 1, 1, 1, 1], []),
        ([6], []),
        ([2, 1], [(0, 1), (1, 0)]),
    ],
    ids=["plain", "one-atom", "images", "single-atoms", "no-edges", "pair"],
)
@pytest.mark.parametrize("case", ["equal", "student-alike", "teacher-alike", "both-alike", "zero"])
def test_gradients_are_finite_where_nothing_differs(kind, n_atoms, edges, case):
    n = sum(n_atoms)
    row = random(1, 6)
    x = {"equal": random(n, 6), "student-alike": row.repeat(n, 1), "teacher-alike": random(n, 6),
         "both-alike": row.repeat(n, 1), "zero": torch.zeros(n, 6)}[case].requires_grad_()  # fmt: skip
    y = {"equal": random(n, 6), "student-alike": random(n, 6, seed=3)}.get(case, row.repeat(n, 1))
    loss = structure_loss(kind, x, y, batch_of(n_atoms, edges))
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()
    if case == "equal":
        assert abs(loss.item()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision_does_not_touch_the_losses(kind):
    x, y = random(7, 6), random(7, 9, seed=1)
    exact = structure_loss(kind, x, y, TWO)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = structure_loss(kind, x, y, TWO)
        low = structure_loss(kind, x.bfloat16(), y, TWO)
    assert under.dtype == low.dtype == torch.float32
    assert torch.equal(under, exact)
    assert torch.equal(low, structure_loss(kind, x.bfloat16().float(), y, TWO))


def test_identity_heads_compare_unequal_widths_through_the_objective():
    """Six terms beside each other, one loss of the same taps twice; each is what its function gives."""
    texts = ["n2n=1,head=identity,loss=cka", "n2n=2,head=identity,loss=gsp", "n2n=3,head=identity,loss=lsp",
             "v2v=4,head=identity,loss=gsp", "v2v=5,head=identity,loss=lsp", "n2n=6,loss=gsp"]  # fmt: skip
    terms = tuple(KDTerm(**term) for term in parse_kd(texts))
    student_specs = {"node": node_spec(6), "v2v": v2v_spec(6)}
    teacher_specs = {"node": node_spec(9), "v2v": v2v_spec(9)}
    heads = make_heads(terms, student_specs, teacher_specs)
    weights = {term.label: float(term.weight) for term in terms}
    objective = Objective(terms, weights, heads, 1.0, 1.0)
    teacher = {"node": random(7, 9, seed=1), "v2v": random(7, 3, 9, seed=2)}
    targets = Targets(torch.zeros(2), torch.zeros(7, 3), torch.ones(7, dtype=torch.bool), teacher)
    student = {"node": random(7, 6), "v2v": random(7, 3, 6)}
    outputs = student | {"energy": torch.zeros(2), "forces": torch.zeros(7, 3)}
    total, parts = objective(outputs, targets, TWO)
    linear = heads["n2n,loss=gsp"](student["node"])
    assert linear.shape == (7, 9)
    expected = {
        "n2n,head=identity,loss=cka": cka_loss(student["node"], teacher["node"]),
        "n2n,head=identity,loss=gsp": gsp_loss(student["node"], teacher["node"], TWO.system_idx, 2),
        "n2n,head=identity,loss=lsp": lsp_loss(student["node"], teacher["node"], TWO.edge_index),
        "v2v,head=identity,loss=gsp": gsp_loss(student["v2v"], teacher["v2v"], TWO.system_idx, 2),
        "v2v,head=identity,loss=lsp": lsp_loss(student["v2v"], teacher["v2v"], TWO.edge_index),
        "n2n,loss=gsp": gsp_loss(linear, teacher["node"], TWO.system_idx, 2),
    }
    for label, loss in expected.items():
        torch.testing.assert_close(parts[label], loss)
    torch.testing.assert_close(total, sum(weights[label] * loss for label, loss in expected.items()))

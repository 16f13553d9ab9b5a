"""HSIC_1 and CKA against the estimator's definition, hand-worked numbers, gradients and invariances."""

import itertools

import numpy as np
import pytest
import torch

from molkd.pipeline.similarity import MIN_ROWS, cka, hsic, hsic_table, normalized

FLOAT64 = 1e-11  # relative to the largest of the terms that are added up


def by_definition(x, y):
    """The average over all ordered quadruples (s, t, u, v) of different rows: K_st (L_st + L_uv - 2 L_su)."""
    k, m = x.flatten(1) @ x.flatten(1).T, y.flatten(1) @ y.flatten(1).T
    quadruples = itertools.permutations(range(len(x)), 4)
    return np.mean([float(k[s, t] * (m[s, t] + m[u, v] - 2 * m[s, u])) for s, t, u, v in quadruples])


def by_gram(x, y):
    """Song's formula, letter by letter, from Gram matrices of features that nobody centred."""
    k, m = (f.flatten(1) @ f.flatten(1).T for f in (x, y))
    k, m, n = k.fill_diagonal_(0), m.fill_diagonal_(0), len(x)
    one = torch.ones(n, dtype=k.dtype)
    trace = torch.trace(k @ m)
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    last = 2 / (n - 2) * (one @ k @ m @ one)
    return float((trace + middle - last) / (n * (n - 3)))


def features(n, *shape, seed=0, mean=0.0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, dtype=torch.float64, generator=rng) + mean


def orthogonal(n, seed=0):
    return torch.linalg.qr(features(n, n, seed=seed))[0]


def test_hand_worked():
    """Rows 0, 0, 1, 1: of 24 ordered quadruples 4 have K_st = 1, with L_st = 1, L_uv = 0 and L_su = 0."""
    x = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert hsic(x, x) == pytest.approx(4 / 24)
    y = torch.tensor([0.0, 1.0, 0.0, 1.0])  # nothing in common
    # K_st = 1 for (s, t) = (2, 3) and (3, 2); there L_su = 1 in the one quadruple (3, 2, 1, 0)
    assert hsic(x, y) == pytest.approx(-2 / 24)
    assert cka(x, y) == pytest.approx(-0.5)
    assert cka(x, 1 - 3 * x) == pytest.approx(1)


@pytest.mark.parametrize(("p", "q"), [((3,), (2,)), ((3, 2), (3, 4)), ((40,), (3,))])
def test_the_average_over_quadruples(p, q):
    x, y = features(7, *p, mean=2.0), features(7, *q, seed=1, mean=-1.0)
    assert hsic(x, y) == pytest.approx(by_definition(x, y), rel=1e-9)
    assert hsic(x, x) == pytest.approx(by_definition(x, x), rel=1e-9)


@pytest.mark.parametrize("n", [4, 30, 200])
@pytest.mark.parametrize(("p", "q"), [(5, 3), (64, 48), (300, 7)])
def test_both_forms_are_songs_formula(n, p, q):
    """Narrow features go by |X'Y|^2, wide ones by Gram matrices."""
    x = features(n, p, mean=0.5)
    y = features(n, q, seed=1) + x[:, :1]
    scale = abs(by_gram(x, x) * by_gram(y, y)) ** 0.5 + float(x.square().mean() * y.square().mean())
    assert hsic(x, y) == pytest.approx(by_gram(x, y), abs=FLOAT64 * p * q * scale)


def test_many_at_once_are_the_pairs():
    rows, columns = [features(20, w, seed=w) for w in (3, 30)], [features(20, 3, 4), features(20, 90)]
    table = hsic_table(rows, columns)
    assert table.shape == (2, 2)
    for i, x in enumerate(rows):
        for j, y in enumerate(columns):
            assert table[i, j] == pytest.approx(float(hsic(x, y)), rel=1e-10)


def test_independent_features_have_none_on_average():
    """The biased estimate would be near P Q / n = 0.3 x |x|^2 |y|^2 / (P Q); this one is centred on zero."""
    values = [float(hsic(features(12, 2, seed=s), features(12, 2, seed=10_000 + s))) for s in range(600)]
    assert abs(np.mean(values)) < 4 * np.std(values) / len(values) ** 0.5
    assert np.std(values) > 0.1


def test_invariances():
    x = features(50, 6, mean=1.0)
    y = torch.cat([x[:, :3].tanh(), features(50, 8, seed=1)], dim=1)
    expected = float(cka(x, y))
    assert 0.05 < expected < 0.9
    shift = features(1, 6, seed=3)
    for same in (x @ orthogonal(6), 7.5 * x, -x, x + shift, 1e-3 * x @ orthogonal(6, seed=2) + 2 * shift):
        assert cka(same, y) == pytest.approx(expected, rel=1e-10)
        assert cka(same, x) == pytest.approx(1, rel=1e-10)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert cka(x[order], y[order]) == pytest.approx(expected, rel=1e-10)
    assert cka(y, x) == pytest.approx(expected, rel=1e-10)
    assert abs(float(cka(x @ features(6, 6, seed=5), y)) - expected) > 1e-3  # a map that is not orthogonal
    assert abs(float(cka(x[order], y)) - expected) > 0.02


def test_vectors_of_one_rotation():
    """Both may be turned, each by its own rotation, and channels be mixed orthogonally."""
    x, y = features(40, 3, 5), features(40, 3, 7, seed=1)
    y = y + 2 * x[:, :, :1]
    expected = float(cka(x, y))
    turned = torch.einsum("xy,nyc->nxc", orthogonal(3), x) @ orthogonal(5, seed=4)
    assert cka(turned, y) == pytest.approx(expected, rel=1e-10)
    assert cka(turned, torch.einsum("xy,nyc->nxc", orthogonal(3, seed=8), y)) == pytest.approx(
        expected, rel=1e-10
    )
    stretched = x * torch.tensor([1.0, 2.0, 1.0])[:, None]
    assert abs(float(cka(stretched, y)) - expected) > 1e-3


def test_gradients():
    x = features(9, 3).requires_grad_()
    y = features(9, 2, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(cka, (x, y))
    wide = features(5, 40, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(hsic, (wide, wide.detach() ** 2))


def test_features_that_do_not_vary():
    """No division by zero, and gradients that are finite, also in single precision."""
    flat = torch.ones(6, 3).requires_grad_()
    value = cka(flat, torch.randn(6, 2, generator=torch.Generator().manual_seed(0)))
    value.backward()
    assert float(value.detach()) == 0
    assert flat.grad.abs().max() == 0
    assert normalized(torch.tensor(1.0), torch.tensor(-1e-3), torch.tensor(1.0)) == 0


def test_single_precision_of_small_features():
    """Squares of squares of 1e-8 underflow in float32 if their product is formed."""
    x = 1e-8 * features(64, 4)
    y = 1e-8 * (x * 1e8 + features(64, 4, seed=1))
    assert cka(x.float(), y.float()) == pytest.approx(float(cka(x, y)), abs=1e-4)


def test_too_few_rows():
    assert torch.isfinite(hsic(features(MIN_ROWS, 2), features(MIN_ROWS, 3)))
    with pytest.raises(ValueError, match="3 rows; the unbiased estimate needs 4"):
        hsic(features(3, 2), features(3, 2))
    with pytest.raises(ValueError, match=r"features of \[5, 6\] rows"):
        hsic(features(5, 2), features(6, 2))

"""The unbiased estimate of HSIC and linear CKA from it: how alike two sets of features of the same rows are.

For n rows with Gram matrices K and L, and K', L' the same with zeros on the diagonal, Song et al. 2012 have

    HSIC_1 = [tr(K'L') + (1'K'1)(1'L'1) / ((n-1)(n-2)) - 2/(n-2) 1'K'L'1] / (n(n-3)),

and CKA = HSIC_1(K, L) / sqrt(HSIC_1(K, K) HSIC_1(L, L)) (Kornblith et al. 2019; Section 4 of the paper).

Here K = XX' and L = YY' are linear, and no n x n matrix is needed. HSIC_1 does not change if one vector is
subtracted from all rows of X, or of Y: it is an average over four different rows, in which what is added to K
cancels. With the mean subtracted the rows of K sum to zero, so K'1 = -k with k = diag(K) the squared norms of
the rows, 1'K'1 = -sum(k), 1'K'L'1 = k.l and tr(K'L') = |X'Y|^2 - k.l, with the Frobenius norm. Therefore

    n(n-3) HSIC_1 = |X'Y|^2 - n/(n-2) k.l + sum(k) sum(l) / ((n-1)(n-2)),

which costs n P Q operations for widths P and Q. |X'Y|^2 is also the sum of K times L, entry by entry, which
is cheaper if the features are wider than the batch is long, or if many are compared with many.

Vector features (n, 3, C) count as 3C numbers: K is the inner product over x, y, z and channels, which is the
same after one rotation of all rows.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

MIN_ROWS = 4  # the estimate is an average over four different rows


def hsic(x: Float[Tensor, "n ..."], y: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
    """Return HSIC_1 of the linear Gram matrices of two features; its expectation does not depend on n.

    Differentiable, in the precision and on the device of the features, with no synchronisation.

    Raises
    ------
    ValueError
        If there are fewer than MIN_ROWS rows.
    """
    return hsic_table([x], [y])[0, 0]


def cka(x: Float[Tensor, "n ..."], y: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
    """Return the linear CKA of one batch, 1 at most but for noise; 0 for features that do not vary.

    Differentiable, as `hsic`. A mean of this over batches is not CKA: sum the three HSIC_1 over batches and
    divide then (`molkd.pipeline.evaluation.cka`).
    """
    return normalized(hsic(x, y), hsic(x, x), hsic(y, y))


def normalized(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """Return xy / sqrt(xx yy), 0 where a feature does not vary (xx or yy not above zero)."""
    tiny = torch.finfo(xy.dtype).tiny  # the roots are taken apart: in float32 the product may underflow
    varies = (xx > tiny) & (yy > tiny)
    return torch.where(varies, xy, 0) / (xx.clamp(min=tiny).sqrt() * yy.clamp(min=tiny).sqrt())


def hsic_table(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Float[Tensor, "rows columns"]:
    """Return HSIC_1 between each of `rows` and each of `columns`, features (n, ...) of the same n rows.

    Raises
    ------
    ValueError
        If there are fewer than MIN_ROWS rows, or not equally many.
    """
    lengths = {len(features) for features in (*rows, *columns)}
    if len(lengths) > 1:
        raise ValueError(f"features of {sorted(lengths)} rows cannot be compared")
    n = lengths.pop()
    if n < MIN_ROWS:
        raise ValueError(f"{n} rows; the unbiased estimate needs {MIN_ROWS}")
    x, y = [_centered(f) for f in rows], [_centered(f) for f in columns]
    k = torch.stack([f.square().sum(1) for f in x])  # (rows, n)
    m = torch.stack([f.square().sum(1) for f in y])  # (columns, n)
    sums = k.sum(1)[:, None] * m.sum(1)[None]
    return (_cross(x, y) - n / (n - 2) * (k @ m.T) + sums / ((n - 1) * (n - 2))) / (n * (n - 3))


def _centered(features: Tensor) -> Float[Tensor, "n P"]:
    flat = features.flatten(1) if features.ndim > 1 else features[:, None]
    return flat - flat.mean(0)


def _cross(x: list[Tensor], y: list[Tensor]) -> Float[Tensor, "rows columns"]:
    """Return |X'Y|^2 for all pairs by the cheaper of its two forms."""
    n = len(x[0])
    widths = [sum(f.shape[1] for f in group) for group in (x, y)]
    if n * widths[0] * widths[1] <= n * n * (sum(widths) + len(x) * len(y)):
        return torch.stack([torch.stack([(a.T @ b).square().sum() for b in y]) for a in x])
    grams = [torch.stack([(f @ f.T).flatten() for f in group]) for group in (x, y)]  # (rows, n x n)
    return grams[0] @ grams[1].T

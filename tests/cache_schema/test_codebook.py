"""Fitted encodings: hand-worked codes and bytes, error bounds, symmetry, NumPy against torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molkd.cache_schema.codebook import Codebook, decode_rows, encode_rows, make_codebook
from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.fields import edge_spec, energy_spec, forces_spec, node_spec, v2v_spec
from molkd.cache_schema.fitting import allocate_bits, fit_codebook

ENCODINGS = ["int8", "pca:16", "pca:8", "pca:3"]
C = 16


def features(n: int, seed: int = 0, *, vectors: bool = False) -> np.ndarray:
    """Correlated channels of very different size, with a mean unless they are vectors."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(C, C)) * np.exp(-np.arange(C) / 3)
    rows = rng.normal(size=(n, 3, C) if vectors else (n, C)) @ mix.T
    return (rows if vectors else rows + rng.normal(size=C) * 5).astype(np.float32)


def book_of(bits: list[int], **changes) -> Codebook:
    k = len(bits)
    arrays = {
        "step": np.ones(k, np.float32),
        "bits": np.array(bits, np.uint8),
        "mean": np.zeros(k, np.float32),
        "basis": np.eye(k, dtype=np.float32),
    }
    return Codebook("pca:9", **(arrays | changes), n_systems=1)


def test_int8_by_hand():
    step, mean = np.array([1.0, 0.5], np.float32), np.array([1.0, 0.0], np.float32)
    book = Codebook("int8", step, np.full(2, 8, np.uint8), mean, None, 1)
    codes, scale = np.array([[3, -4]], np.int8), np.array([0.5], np.float16)
    np.testing.assert_array_equal(decode_rows(codes, scale, book), [[1 + 0.5 * 3, 0.5 * 0.5 * -4]])
    # The channel that is largest in units of its step times 127 gets the code 127: here the second one.
    codes, scale = encode_rows(np.array([[1.0 + 12.7, 63.5]], np.float32), book)
    np.testing.assert_array_equal(codes, [[13, 127]])  # 12.7 / 1.001 rounds to 13
    np.testing.assert_array_equal(scale, np.array([1.001], np.float16))  # 1 rounded up by 2^-10


def test_bytes_of_a_rotated_row_by_hand():
    book = book_of([16, 8, 4, 4])
    stored = np.array([[0x2C, 0x01, 0xFB, 0xE3]], np.uint8)  # 300 little-endian, -5, then 3 low and -2 high
    np.testing.assert_array_equal(decode_rows(stored, np.array([2.0], np.float16), book), [[600, -10, 6, -4]])
    swapped = book_of([16, 8, 4, 4], basis=np.eye(4, dtype=np.float32)[[1, 0, 3, 2]])
    np.testing.assert_array_equal(
        decode_rows(stored, np.array([1.0], np.float16), swapped), [[-5, 300, -2, 3]]
    )
    # 7 is the largest code of 4 bits: with it in the row the scale is 1, rounded up, and all is as it was.
    codes, scale = encode_rows(np.array([[300, -5, 7.0, -2]], np.float32), book)
    np.testing.assert_array_equal(codes, [[0x2C, 0x01, 0xFB, 0xE7]])
    assert scale[0] == np.float16(1.001)


@pytest.mark.parametrize(
    ("n_bytes", "bits"),
    [
        (1, [8]),  # the first component in 8 bits saves more than the second in 4
        (2, [8, 8]),
        (3, [8, 8, 8]),
        (4, [16, 8, 8]),
        (9, [16, 16, 16]),
    ],
)
def test_bits_go_where_they_save_most(n_bytes, bits):
    """Variances 100, 1, 0.01; a code of 4, 8, 16 bits leaves 0.0153, 4.65e-5, 7e-10 of a variance."""
    assert allocate_bits(np.array([100.0, 1.0, 0.01]), n_bytes).tolist() == bits


def test_single_codes_of_four_bits_get_company():
    assert allocate_bits(np.array([1.0, 0.9, 0.8, 0.7, 0.6]), 2).tolist() == [4, 4, 4, 4]
    assert allocate_bits(np.array([1.0]), 1).tolist() == [8]


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("encoding", ["int8", "pca:64"])
@given(seed=st.integers(0, 1000), size=st.sampled_from([1e-3, 1.0, 50.0]))
@settings(max_examples=10, deadline=None)
def test_no_code_is_off_by_more_than_half_a_unit(encoding, vectors, seed, size):
    """Where no component is left out, whatever the row: new ones, much smaller and larger ones."""
    spec = v2v_spec(C) if vectors else node_spec(C)
    book = fit_codebook(features(200, vectors=vectors), spec, encoding, 3)
    rows = features(20, seed, vectors=vectors) * np.float32(size)
    codes, scale = encode_rows(rows, book)
    fits = np.isfinite(scale)
    assert fits.all() or size > 1  # 50 times what was fitted may be too large for a scale in half precision
    rows, codes, scale = rows[fits], codes[fits], scale[fits]
    error = decode_rows(codes, scale, book).astype(np.float64) - rows
    unit = scale.astype(np.float64).reshape(-1, *[1] * (rows.ndim - 1)) * book.step
    half = unit / 2 if book.basis is None else (unit / 2) @ np.abs(book.basis)
    assert (np.abs(error) <= half * 1.001 + 1e-5 * np.abs(rows).max(initial=0)).all()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_is_left_out_is_what_the_smaller_components_hold(encoding):
    rows = features(4000)
    book = fit_codebook(rows, node_spec(C), encoding, 3)
    error = decode_rows(*encode_rows(rows, book), book).astype(np.float64) - rows
    variance = np.linalg.eigvalsh(np.cov(rows.T.astype(np.float64), bias=True))[::-1]
    dropped = variance[len(book.step) :].sum() / C
    assert dropped <= (error**2).mean() < dropped + 0.03 * variance.sum() / C
    assert book.row_bytes == (C if encoding == "int8" else int(encoding[4:]))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_vectors_stay_equivariant(encoding):
    rows = features(300, vectors=True)
    book = fit_codebook(rows[:200], v2v_spec(C), encoding, 3)
    read = decode_rows(*encode_rows(rows, book), book)
    quarter = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]], np.float32)
    turned = decode_rows(*encode_rows(np.einsum("xy,nyc->nxc", quarter, rows), book), book)
    np.testing.assert_allclose(turned, np.einsum("xy,nyc->nxc", quarter, read), rtol=0, atol=2e-6)
    # By any angle: rounding differs, but no more than it errs, and there is no direction it prefers.
    q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    turned = decode_rows(*encode_rows(np.einsum("xy,nyc->nxc", q, rows).astype(np.float32), book), book)
    difference = turned - np.einsum("xy,nyc->nxc", q, read)
    error = read - rows
    assert (difference**2).mean() < 2.2 * (error**2).mean() + 1e-10
    assert np.abs(error.mean(axis=(0, 2))).max() < 0.05 * np.abs(rows).std()


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_torch_gives_what_numpy_gives(encoding, vectors):
    rows = features(300, vectors=vectors)
    book = fit_codebook(rows, v2v_spec(C) if vectors else node_spec(C), encoding, 3)
    codes, scale = encode_rows(rows, book)
    codes_t, scale_t = encode_rows(torch.from_numpy(rows), book)
    assert (codes_t.numpy() == codes).mean() > 0.999  # a product of matrices may round another way
    np.testing.assert_allclose(scale_t.numpy(), scale, rtol=1e-3)
    read = decode_rows(torch.from_numpy(codes), torch.from_numpy(scale), book)
    np.testing.assert_allclose(read.numpy(), decode_rows(codes, scale, book), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_components_are_the_values_in_the_basis(encoding):
    rows = features(50)
    book = fit_codebook(features(300), node_spec(C), encoding, 3)
    codes, scale = encode_rows(rows, book)
    components = decode_rows(codes, scale, book, rotate=False)
    values = decode_rows(codes, scale, book)
    basis = np.eye(C, dtype=np.float32) if book.basis is None else book.basis
    np.testing.assert_allclose(components, (values - book.mean) @ basis.T, atol=1e-4)


def test_unknown_and_absurd_rows():
    book = fit_codebook(features(100), node_spec(C), "int8", 3)
    rows = features(4)
    rows[1, 2] = np.nan
    rows[2] = 1e30
    with np.errstate(over="ignore"):
        codes, scale = encode_rows(rows, book)
    assert np.isnan(scale[1])
    assert np.isinf(scale[2])
    assert np.isfinite(scale[[0, 3]]).all()
    assert not codes[1].any()
    zero = np.zeros((1, C), np.float32) + book.mean
    np.testing.assert_allclose(decode_rows(*encode_rows(zero, book), book), zero, atol=1e-4)


def test_a_channel_that_never_varied_does_not_blind_the_others():
    rows = features(300)
    rows[:, 5] = 2.0
    book = fit_codebook(rows, node_spec(C), "int8", 3)
    new = rows[:10].copy()
    new[:, 5] = 2.0 + 0.01 * rows.std()
    error = np.abs(decode_rows(*encode_rows(new, book), book) - new)
    assert error.max() < 0.02 * rows.std()


@pytest.mark.parametrize("spec", [energy_spec(), forces_spec()])
def test_only_features_are_fitted(spec):
    with pytest.raises(CacheError, match="is for features with channels; choose fp32"):
        fit_codebook(np.ones((5, *spec.shape)), spec, "int8", 1)


def test_nothing_to_fit_to():
    with pytest.raises(CacheError, match="no finite row to fit pca:4 to; choose fp16"):
        fit_codebook(np.empty((0, C), np.float32), node_spec(C), "pca:4", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("mean"), "arrays basis, bits, step, expected basis, bits, mean, step"),
        (lambda a: a.update(step=-a["step"]), "a step is not positive"),
        (lambda a: a.update(step=a["step"].astype(np.float64)), "step is float64"),
        (lambda a: a.update(basis=a["basis"][:, :3]), r"basis is float32 \(\d+, 3\)"),
        (lambda a: a["mean"].__setitem__(0, np.inf), "not finite"),
        (lambda a: a["bits"].__setitem__(0, 5), "bits are no decreasing list"),
        (lambda a: a.update(bits=np.sort(a["bits"])), "bits are no decreasing list"),
        (lambda a: a["bits"].__setitem__(slice(None), 16), "bits do not add up"),
    ],
)
def test_a_damaged_codebook_is_refused(change, message):
    arrays = {
        name: a.copy() for name, a in fit_codebook(features(99), node_spec(C), "pca:9", 3).arrays().items()
    }
    make_codebook("pca:9", arrays, 3, node_spec(C), "here")
    change(arrays)
    with pytest.raises(IntegrityError, match=f"here: damaged codebook.*{message}"):
        make_codebook("pca:9", arrays, 3, node_spec(C), "here")


def test_edges_may_be_coded_too():
    rows = features(100)
    book = fit_codebook(rows, edge_spec(C), "int8", 3)
    assert np.abs(decode_rows(*encode_rows(rows, book), book) - rows).max() < 0.1 * rows.std()


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("vectors", [False, True])
def test_no_rows(encoding, vectors):
    rows = features(50, vectors=vectors)
    book = fit_codebook(rows, v2v_spec(C) if vectors else node_spec(C), encoding, 3)
    for none in (rows[:0], torch.from_numpy(rows[:0])):
        codes, scale = encode_rows(none, book)
        assert codes.shape == (0, *rows.shape[1:-1], book.row_bytes)
        assert decode_rows(codes, scale, book).shape == none.shape


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_rows_that_did_not_vary_when_fitted_may_vary_later(size):
    """One row, or rows that differ by rounding: others keep 7 bits and a sign, near the mean or far."""
    rng = np.random.default_rng(0)
    one = (size * rng.normal(size=(1, C))).astype(np.float32)
    noise = one * (1 + 1e-7 * rng.normal(size=(20, C))).astype(np.float32)
    for fitted in (one, np.tile(one, (20, 1)), noise):
        book = fit_codebook(fitted, node_spec(C), "int8", 1)
        for away in (1e-4, 1.0, 8.0):
            rows = (one + away * size * rng.normal(size=(50, C))).astype(np.float32)
            error = decode_rows(*encode_rows(rows, book), book).astype(np.float64) - rows
            unit = 1.01 / 127 * np.abs(rows - book.mean).max()
            assert np.abs(error).max() < unit / 2 + 1e-6 * np.abs(rows).max()


@pytest.mark.parametrize("vectors", [False, True])
def test_rows_that_are_zero_tell_nothing(vectors):
    rows = features(100, vectors=vectors)
    book = fit_codebook(np.zeros_like(rows), v2v_spec(C) if vectors else node_spec(C), "int8", 1)
    error = np.abs(decode_rows(*encode_rows(rows, book), book) - rows)
    assert error.max() <= 0.51 / 127 * np.abs(rows).max()

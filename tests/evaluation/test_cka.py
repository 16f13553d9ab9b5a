"""Minibatch CKA against the whole at once, the mixing of atoms, what is kept, and the picture."""

import csv
import io
import json

import numpy as np
import pytest
import torch

from molkd.pipeline.errors import DataError
from molkd.pipeline.evaluation.cka import CKASums, atom_batches
from molkd.pipeline.evaluation.cka_plot import plot_cka
from molkd.pipeline.evaluation.cka_result import FOLDER, CKAResult, load_comparisons
from molkd.pipeline.similarity import cka, hsic


def features(n, width, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def pair(n):
    """Two features of other widths with a part in common."""
    x = features(n, 12)
    return x, torch.cat([x[:, :4] + features(n, 4, 1), features(n, 2, 2)], dim=1)


def minibatch(x, y, batch_atoms, seed=0):
    sums = CKASums()
    for a, b in atom_batches([(x, y)], np.random.default_rng(seed), batch_atoms=batch_atoms):
        sums.add([a], [b])
    return float(sums.values()[0, 0])


def test_one_batch_is_the_whole():
    x, y = pair(300)
    assert minibatch(x, y, 300) == pytest.approx(float(cka(x.double(), y.double())), rel=1e-12)


def test_sums_before_the_ratio():
    """Two batches of very different size in x: the mean of the two ratios would be another number."""
    x, y = pair(40)
    x = x.double() * torch.where(torch.arange(40) < 20, 1.0, 5.0)[:, None]
    sums = CKASums()
    for rows in (slice(0, 20), slice(20, 40)):
        sums.add([x[rows]], [y[rows]])
    parts = [[hsic(a[r], b[r]) for r in (slice(0, 20), slice(20, 40))] for a, b in ((x, y.double()), (x, x))]
    own = sum(hsic(y[r].double(), y[r].double()) for r in (slice(0, 20), slice(20, 40)))
    expected = float(sum(parts[0]) / (sum(parts[1]) * own).sqrt())
    assert sums.values()[0, 0] == pytest.approx(expected, rel=1e-9)
    ratios = [float(cka(x[r], y[r].double())) for r in (slice(0, 20), slice(20, 40))]
    assert abs(np.mean(ratios) - expected) > 1e-3
    assert (sums.n_atoms, sums.n_batches) == (40, 2)


def test_small_batches_converge_to_the_full_batch():
    """In batches of 16 the biased estimate would be far off: its own terms grow by about P / n."""
    x, y = pair(6000)
    full = float(cka(x.double(), y.double()))
    assert 0.2 < full < 0.6
    for batch_atoms in (16, 64, 512):
        assert minibatch(x, y, batch_atoms) == pytest.approx(full, abs=0.012)

    def biased(a, b):
        a, b = a - a.mean(0), b - b.mean(0)
        return (a.T @ b).square().sum()

    parts = list(zip(x.double().split(16), y.double().split(16), strict=True))
    xy, xx = sum(biased(a, b) for a, b in parts), sum(biased(a, a) for a, _ in parts)
    yy = sum(biased(b, b) for _, b in parts)
    assert float(xy / (xx * yy).sqrt()) > full + 0.05


def test_many_features_at_once():
    x, y = pair(200)
    vectors = torch.randn(200, 3, 5, generator=torch.Generator().manual_seed(9))
    sums = CKASums()
    sums.add([x, vectors], [y, x, vectors])
    values = sums.values()
    assert values.shape == (2, 3)
    assert values[0, 1] == pytest.approx(1)
    assert values[1, 2] == pytest.approx(1)
    assert values[0, 0] == pytest.approx(float(cka(x.double(), y.double())))
    assert abs(values[1, 0]) < 0.05


def test_features_that_are_equal_at_all_atoms_have_no_value():
    """Also where the noise of single precision tells them apart."""
    x, _ = pair(100)
    noisy = 50.0 + 5e-6 * features(100, 6, seed=3)
    sums = CKASums()
    sums.add([x, torch.ones(100, 3), noisy], [x])
    assert np.isnan(sums.values()[:, 0]).tolist() == [False, True, True]


@pytest.mark.parametrize(("sizes", "batch_atoms"), [((5, 7, 30, 1), 10), ((400,) * 12, 20), ((3, 1), 50)])
def test_every_atom_is_in_one_batch_once(sizes, batch_atoms):
    """Kinds stay together, and sizes are between the one asked for and twice that."""
    n = sum(sizes)
    numbers, double = torch.arange(n), 2 * torch.arange(n)
    blocks = list(zip(numbers.split(sizes), double.split(sizes), strict=True))
    batches = list(atom_batches(blocks, np.random.default_rng(0), batch_atoms=batch_atoms))
    assert sorted(torch.cat([a for a, _ in batches]).tolist()) == list(range(n))
    assert all(torch.equal(2 * a, b) for a, b in batches)
    lengths = [len(a) for a, _ in batches]
    assert max(lengths) < 2 * batch_atoms
    assert min(lengths) >= min(batch_atoms, n)
    again = list(atom_batches(blocks, np.random.default_rng(0), batch_atoms=batch_atoms))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, again, strict=True))
    other = list(atom_batches(blocks, np.random.default_rng(1), batch_atoms=batch_atoms))
    assert not all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, other, strict=True))


def test_a_long_stream_is_not_held():
    """Batches come while blocks still do; no more than two windows wait."""
    n_read = 0

    def blocks():
        nonlocal n_read
        for begin in range(0, 100_000, 50):
            n_read += 50
            yield (torch.arange(begin, begin + 50),)

    n_given = 0
    for (batch,) in atom_batches(blocks(), np.random.default_rng(0), batch_atoms=10):
        n_given += len(batch)
        assert n_read - n_given < 400
        assert batch.max() - batch.min() > 30  # mixed beyond neighbours
    assert n_given == 100_000


def test_three_atoms_are_too_few():
    assert list(atom_batches([(torch.arange(3),)], np.random.default_rng(0))) == []


def result(n_rows=2, n_columns=3, **changes):
    values = np.linspace(0, 1, n_rows * n_columns).reshape(n_rows, n_columns)
    values[0, 1] = np.nan
    rows = tuple(f"layer/U{i + 1}" for i in range(n_rows))
    columns = tuple(f"layer/H{i}" for i in range(n_columns - 1))
    settings = {"a": "student", "b": "teacher", "data": "test"} | changes
    settings |= {"n_systems": 5, "n_atoms": 1234, "n_batches": 2}
    return CKAResult(rows=rows, columns=(*columns, "node"), values=values, seed=7, **settings)


def test_the_file_holds_what_readers_expect(tmp_path):
    result().save(tmp_path / FOLDER / "teacher-on-test.json")
    content = json.loads((tmp_path / FOLDER / "teacher-on-test.json").read_text())
    assert content["rows"] == ["layer/U1", "layer/U2"]
    assert content["columns"] == ["layer/H0", "layer/H1", "node"]
    assert content["values"] == [[0.0, None, 0.4], [pytest.approx(0.6), 0.8, 1.0]]
    assert [content[k] for k in ("a", "b", "data", "n_atoms")] == ["student", "teacher", "test", 1234]
    (again,) = load_comparisons(tmp_path).values()
    assert again.to_dict() == content
    assert not again.within
    assert load_comparisons(tmp_path / "other") == {}


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: "{",
        lambda c: "[]",
        lambda c: json.dumps({k: v for k, v in c.items() if k != "rows"}),
        lambda c: json.dumps(c | {"columns": ["node"]}),
        lambda c: json.dumps(c | {"values": [["x", 1, 2], [3, 4, 5]]}),
        lambda c: json.dumps(c | {"n_atoms": "many"}),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "cka.json"
    path.write_text(damage(result().to_dict()))
    with pytest.raises(DataError, match=r"cka\.json: not a readable comparison .*`kd cka` makes it again"):
        CKAResult.load(path)


def test_table_and_csv():
    lines = result().text().splitlines()
    assert lines[0] == "CKA of student and teacher (rows: student); 1,234 atoms of 5 systems of test"
    assert lines[1].split() == ["H0", "H1", "node"]
    assert lines[3].split() == ["U1", "0.000", "–", "0.400"]
    rows = list(csv.reader(io.StringIO(result().csv())))
    assert rows[0] == ["tap", "layer/H0", "layer/H1", "node"]
    assert rows[1] == ["layer/U1", "0.000000", "", "0.400000"]
    within = result(b="student")
    assert within.within
    assert within.text().startswith("CKA of student; ")


def test_heat_map():
    figure = plot_cka(result())
    ax = figure.axes[0]
    (image,) = ax.images
    assert image.get_clim() == (0, 1)
    assert np.ma.filled(image.get_array(), np.nan) == pytest.approx(result().values, nan_ok=True)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["H0", "H1", "node"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["U1", "U2"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("teacher", "student")
    assert [t.get_text() for t in ax.texts] == ["0.00", "–", "0.40", "0.60", "0.80", "1.00"]
    assert not list(plot_cka(result(40, 40)).axes[0].texts)  # no room

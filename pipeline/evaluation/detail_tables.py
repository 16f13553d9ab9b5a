"""Tables of what stands beside the metrics: parts of the data, the tail, the worst systems, speeds."""

from collections.abc import Mapping, Sequence

from molkd.pipeline.evaluation.breakdown import Breakdown
from molkd.pipeline.evaluation.metrics import REPORTED
from molkd.pipeline.evaluation.result import Evaluation
from molkd.pipeline.evaluation.tables import Column
from molkd.pipeline.evaluation.tail import QUANTILES, WORST
from molkd.pipeline.evaluation.throughput import Conditions, Speed
from molkd.pipeline.evaluation.worst import WorstSystem
from molkd.pipeline.units import MILLI

Table = tuple[list[dict[str, object]], list[Column]]
_FORCES = ("force_mae_meV_A", "force_cos")


def breakdown_table(found: Breakdown, most: int = 30) -> Table:
    """Return a row for each part of the data, sizes put together in ranges; beyond `most` the number only."""
    found = found.in_ranges()
    shown = REPORTED if not found.of_atoms else {key: REPORTED[key] for key in _FORCES}
    rows: list[dict[str, object]] = []
    for key, metrics in found.metrics().items():
        counts: dict[str, object] = {"atoms": metrics.n_force_atoms}
        if not found.of_atoms:
            counts = {"systems": metrics.n_systems, **counts}
        rows.append({found.kind: key, **counts, **{m: metrics.to_report()[m] for m in shown}})
    n_more = len(rows) - most
    if n_more > 0:
        rows = [*rows[:most], {found.kind: f"{n_more} more, see --json"}]
    columns = [Column(found.kind, found.kind.replace("size", "atoms a system"))]
    if not found.of_atoms:
        columns.append(Column("systems", "systems"))
    columns.append(Column("atoms", "free atoms"))
    return rows, [*columns, *(Column(m.key, m.title, decimals=m.decimals) for m in shown.values())]


def tail_table(evaluation: Evaluation) -> Table:
    """Return quantiles of the errors; no row where nothing was labelled."""
    rows: list[dict[str, object]] = []
    for name, tail in (
        ("energy (meV)", evaluation.energy_tail),
        ("force component (meV/Å)", evaluation.force_tail),
    ):
        if tail is not None:
            row: dict[str, object] = {"error": name, "max": MILLI * tail.largest}
            row |= {f"{q:g}": MILLI * v for q, v in zip(QUANTILES, tail.quantiles, strict=True)}
            rows.append(row | {"share": 100 * tail.worst_share})
    quantiles = [Column(f"{q:g}", f"{100 * q:g} % below") for q in QUANTILES]
    share = Column("share", f"share of worst {100 * WORST:g} % (%)", decimals=1)
    return rows, [Column("error", "absolute error"), *quantiles, Column("max", "largest"), share]


def worst_table(worst: Sequence[WorstSystem], most: int) -> Table:
    """Return the worst systems, worst first."""
    rows = [{"rank": i, **w.to_report(), "id": w.id[:8]} for i, w in enumerate(worst[:most], start=1)]
    titles = {
        "rank": "", "source": "system", "id": "id", "formula": "formula",
        "energy_error_meV": "energy error (meV)", "force_error_meV_A": "largest force error (meV/Å)",
        "atom": "on atom",
    }  # fmt: skip
    return rows, [Column(key, title) for key, title in titles.items()]


def speed_table(speeds: Mapping[str, Speed]) -> Table:
    """Return systems per second of models that took turns."""
    rows: list[dict[str, object]] = []
    for name, speed in speeds.items():
        row: dict[str, object] = {"model": name}
        for key, found in (("model_only", speed.model), ("end_to_end", speed.end_to_end)):
            row[key] = found.median
            row[f"{key}_spread"] = f"{found.lower_quartile:.3g} to {found.upper_quartile:.3g}"
        rows.append(row)
    return rows, [
        Column("model", "model"),
        Column("model_only", "model only\n(systems/s)"),
        Column("model_only_spread", "middle half\nof rounds"),
        Column("end_to_end", "end to end\n(systems/s)"),
        Column("end_to_end_spread", "middle half\nof rounds"),
    ]


def conditions_text(conditions: Conditions) -> str:
    """Return what a throughput was measured with, in words."""
    n = conditions.n_threads
    parts = [
        conditions.device,
        f"{n} thread{'' if n == 1 else 's'}" if n else "",
        f"batches of {conditions.batch_size}",
        f"{conditions.atoms_per_system:.1f} atoms a system",
        conditions.dtype,
        f"torch {conditions.torch}",
    ]
    return ", ".join(part for part in parts if part)

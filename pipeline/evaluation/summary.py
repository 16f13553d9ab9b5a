"""What `kd evaluate` prints: one model on one or several data sets, as text or plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from molkd.pipeline.evaluation.detail_tables import (
    Table,
    breakdown_table,
    conditions_text,
    speed_table,
    tail_table,
    worst_table,
)
from molkd.pipeline.evaluation.metrics import REPORTED
from molkd.pipeline.evaluation.result import Evaluation
from molkd.pipeline.evaluation.tables import Column, format_table
from molkd.pipeline.evaluation.throughput import Speed
from molkd.pipeline.evaluation.worst import RANKINGS
from molkd.pipeline.units import MILLI

_END_TO_END = "end to end: neighbour lists, transfer, model, results back"
_TITLES = {"energy": "largest errors of the energy", "forces": "largest errors of a force"}


@dataclass(frozen=True)
class EvaluationSummary:
    """One model on one data set; None where nothing was labelled."""

    model: str
    data: str
    n_systems: int
    n_energies: int
    n_force_atoms: int
    energy_mae_meV: float | None  # noqa: N815  # the unit is written as in reports
    energy_mae_meV_per_atom: float | None  # noqa: N815
    force_mae_meV_A: float | None  # noqa: N815
    force_rmse_meV_A: float | None  # noqa: N815
    force_cos: float | None
    efwt_percent: float | None
    systems_per_second: float | None

    @classmethod
    def of(cls, model: str, data: str, result: Evaluation) -> "EvaluationSummary":
        """Summarise an evaluation."""
        metrics, report = result.metrics, result.to_report()
        has_energy, has_forces = metrics.n_energies > 0, metrics.n_force_atoms > 0
        return cls(
            model=model,
            data=data,
            n_systems=metrics.n_systems,
            n_energies=metrics.n_energies,
            n_force_atoms=metrics.n_force_atoms,
            energy_mae_meV=report["energy_mae_meV"],
            energy_mae_meV_per_atom=MILLI * metrics.energy_mae_per_atom if has_energy else None,
            force_mae_meV_A=report["force_mae_meV_A"],
            force_rmse_meV_A=MILLI * metrics.force_rmse if has_forces else None,
            force_cos=report["force_cos"],
            efwt_percent=report["efwt_percent"],
            systems_per_second=report["systems_per_second"],
        )


@dataclass(frozen=True, eq=False)
class ModelEvaluation:
    """One model on several data sets, the means over groups of them, and its speed beside that of others."""

    sets: Mapping[str, EvaluationSummary]
    evaluations: Mapping[str, Evaluation]  # by the same names
    means: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)  # by group
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)  # which sets a mean is over
    by: tuple[str, ...] = ()  # breakdowns to show
    n_worst: int = 0  # systems to show
    speeds: Mapping[str, Speed] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: of one data set by itself, of several by their names."""
        sets = {name: asdict(summary) | self._details(name) for name, summary in self.sets.items()}
        speeds = {name: speed.to_dict() for name, speed in self.speeds.items()}
        if len(sets) == 1:
            return next(iter(sets.values())) | ({"speeds": speeds} if speeds else {})
        means = {name: {"sets": list(self.groups[name]), **values} for name, values in self.means.items()}
        return {"sets": sets, "means": means} | ({"speeds": speeds} if speeds else {})

    def text(self) -> str:
        """Return tables for a terminal."""
        parts = [self._one()] if len(self.sets) == 1 else [self._several()]
        for name, evaluation in self.evaluations.items():
            where = "" if len(self.sets) == 1 else f"{name}: "
            parts.append(_titled(f"{where}errors", tail_table(evaluation)))
            parts += [_titled(f"{where}by {k}", breakdown_table(evaluation.breakdowns[k])) for k in self.by]
            parts += [
                _titled(f"{where}{_TITLES[by]}", worst_table(evaluation.worst.get(by, ()), self.n_worst))
                for by in RANKINGS
            ]
        if self.speeds:
            conditions = next(iter(self.speeds.values())).model.conditions
            words = f"{conditions_text(conditions)}; {_END_TO_END}"
            parts.append(_titled("throughput, in turns", speed_table(self.speeds)) + f"\n{words}")
        return "\n\n".join(part for part in parts if part)

    def _details(self, name: str) -> dict[str, Any]:
        found = self.evaluations[name]
        tails = {"energy": (found.energy_tail, "meV"), "forces": (found.force_tail, "meV_A")}
        details: dict[str, Any] = {
            "tail": {key: tail.to_report(unit) for key, (tail, unit) in tails.items() if tail is not None},
            "throughput": found.throughput.to_dict() if found.throughput else None,
        }
        if self.by:
            details["by"] = {kind: _plain_breakdown(found, kind) for kind in self.by}
        if self.n_worst:
            details["worst"] = {
                by: [system.to_report() for system in found.worst.get(by, ())[: self.n_worst]]
                for by in RANKINGS
            }
        return details

    def _one(self) -> str:
        name, summary = next(iter(self.sets.items()))
        lines = []
        for key, value in asdict(summary).items():
            shown = f"{value:.6g}" if isinstance(value, float) else value
            if value is not None:
                lines.append(f"{key:<23}  {f'{value:,}' if isinstance(value, int) else shown}")
        throughput = self.evaluations[name].throughput
        if throughput is not None:
            spread = f"middle half of {throughput.n_repeats} repeats"
            spread += f" {throughput.lower_quartile:.3g} to {throughput.upper_quartile:.3g}"
            lines.append(f"{'':<23}  model only, {spread}; {conditions_text(throughput.conditions)}")
        return "\n".join(lines)

    def _several(self) -> str:
        rows: list[dict[str, object]] = [{"name": n, **asdict(summary)} for n, summary in self.sets.items()]
        rows += [
            {"name": f"{'' if name == 'mean' else f'{name}, '}mean of {len(self.groups[name])}", **values}
            for name, values in self.means.items()
        ]
        columns = [
            Column("name", "data"),
            Column("n_systems", "systems"),
            *(Column(m.key, m.title.replace(" (", "\n("), decimals=m.decimals) for m in REPORTED.values()),
            Column("systems_per_second", "systems/s"),
        ]
        return f"{next(iter(self.sets.values())).model}\n{format_table(rows, columns)}"


def _plain_breakdown(found: Evaluation, kind: str) -> dict[str, Any]:
    breakdown = found.breakdowns[kind]
    plain: dict[str, Any] = {}
    for key, metrics in breakdown.metrics().items():
        report: dict[str, Any] = metrics.to_report()
        if breakdown.of_atoms:
            report = {name: report[name] for name in ("force_mae_meV_A", "force_cos")}
        else:
            report |= {"n_systems": metrics.n_systems, "n_energies": metrics.n_energies}
        plain[key] = report | {"n_force_atoms": metrics.n_force_atoms}
    return plain


def _titled(title: str, table: Table) -> str:
    rows, columns = table
    return f"{title}\n{format_table(rows, columns)}" if rows else ""

"""What `kd cache verify --deep` found: deviations check by check, as numbers, as text and as JSON."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.findings import Report
from molkd.cache_schema.summary import describe_report

_ROW = "  {:<34} {:<5} {:>10} {:>10} {:>11} {:>10} {:>10} {:>7}  {}"
_HEAD = ("check", "unit", "largest", "mean", "largest/rms", "mean/rms", "allowed", "used", "")


class Compared(NamedTuple):
    """Two arrays that should be equal, and how far apart rounding may bring them; all of one shape."""

    what: str  # begins with the name of the signal
    found: NDArray[np.float64]
    expected: NDArray[np.float64]
    allowed: NDArray[np.float64]


@dataclass
class Deviation:
    """How far the sampled values of one check are from what they should be."""

    teacher: str  # its name in the store
    what: str
    unit: str
    rms: float  # of the signal, over the whole store
    largest: float = 0.0
    mean: float = 0.0
    allowed: float = 0.0  # the largest over all values; small ones are allowed less
    n_values: int = 0
    n_wrong: int = 0  # beyond what is allowed
    used: float = 0.0  # the largest share of what a value is allowed; 1 is still right
    worst: str = ""  # source of the system with that share

    @property
    def ok(self) -> bool:
        """Whether nothing is beyond what is allowed."""
        return not self.n_wrong

    def add(self, compared: Compared, source: str) -> None:
        """Take in one system."""
        error = np.nan_to_num(np.abs(compared.found - compared.expected), nan=np.finfo(np.float64).max)
        if not error.size:
            return
        share = np.minimum(error / np.maximum(compared.allowed, 1e-300), np.finfo(np.float64).max)
        n_values = self.n_values + error.size
        self.mean += float((error - self.mean).sum()) / n_values
        self.largest = max(self.largest, float(error.max()))
        self.n_values = n_values
        self.n_wrong += int((share > 1).sum())
        self.allowed = max(self.allowed, float(compared.allowed.max()))
        if not self.worst or share.max() > self.used:
            self.used, self.worst = float(share.max()), source


@dataclass
class DeepReport:
    """What was found in the files, and in the sampled systems."""

    files: Report
    systems: dict[str, list[int]] = field(default_factory=dict)  # teacher -> stored indices looked at
    checks: list[Deviation] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # anything else that deviates
    notes: list[str] = field(default_factory=list)  # what could not be checked, what else differs

    @property
    def ok(self) -> bool:
        """Whether files and values are what they should be."""
        return self.files.ok and not self.problems and all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"ok": self.ok} | asdict(self)

    def text(self) -> str:
        """Return a table a teacher, and what deviates."""
        lines = [describe_report(self.files)]
        for teacher, systems in self.systems.items():
            lines += ["", f"teacher {teacher}, {len(systems)} systems"]
            checks = [check for check in self.checks if check.teacher == teacher]
            if checks:
                lines += [_ROW.format(*_HEAD).rstrip(), *_rows(checks)]
        wrong = [check for check in self.checks if not check.ok]
        lines += ["", *self.problems]
        lines += [
            f"{check.teacher}: {check.what}: {check.n_wrong:,} of {check.n_values:,} values deviate, "
            f"most in {check.worst}"
            for check in wrong
        ]
        lines += [f"note: {note}" for note in self.notes]
        if not self.ok:
            verdict = "the store deviates; write the signal again, under another --name"
        else:
            verdict = "ok: all values are what they should be"
        return "\n".join([*lines, verdict])


def _rows(checks: list[Deviation]) -> Iterator[str]:
    for check in checks:
        relative = [f"{x / check.rms:.1e}" if check.rms > 0 else "-" for x in (check.largest, check.mean)]
        yield _ROW.format(
            check.what, check.unit, f"{check.largest:.2e}", f"{check.mean:.2e}", *relative,
            f"{check.allowed:.2e}", f"{check.used:.2g}", "ok" if check.ok else "DEVIATES",
        )  # fmt: skip

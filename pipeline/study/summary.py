"""Where a study stands: what `kd study` prints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molkd.pipeline.study.tables import Tables


@dataclass(frozen=True)
class StudySummary:
    """Where a study stands."""

    name: str
    folder: Path
    n_runs: int
    n_finished: int
    failed: dict[str, str]  # run -> reason
    skipped: dict[str, str]  # line -> why student and teacher do not go together
    waiting: list[str]  # runs that are neither, such as those of another process
    tables: Tables | None = None

    def text(self) -> str:
        """Return the tables, and what is not in them."""
        parts = [self.tables.text()] if self.tables else []
        parts += [listed(f"left out ({len(self.skipped)})", self.skipped)] if self.skipped else []
        parts += [listed(f"failed runs ({len(self.failed)})", self.failed)] if self.failed else []
        state = f"{self.name}: {self.n_finished} of {self.n_runs} runs finished"
        if self.waiting:
            state += f", {len(self.waiting)} are still to be made or in work elsewhere"
        if self.tables:
            state += f"; tables: {self.tables.folder / 'study.html'}"
        return "\n\n".join([*parts, state])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        plain = {key: value for key, value in vars(self).items() if key != "tables"}
        return plain | {"folder": str(self.folder), "lines": self.tables.to_dict() if self.tables else []}


def listed(title: str, reasons: dict[str, str]) -> str:
    """Return a title and one line a reason."""
    return "\n".join([f"{title}:", *(f"  {name}: {reason}" for name, reason in reasons.items())])

"""What a comparison by CKA leaves: a table of values with names on both axes, as JSON, CSV and text."""

import csv
import io
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.pipeline.errors import DataError
from molkd.pipeline.evaluation.tables import Column, format_table
from molkd.pipeline.files import write_atomic

FOLDER = "cka"  # inside a run folder: cka/<what it was compared with>.json


@dataclass(frozen=True, eq=False)
class CKAResult:
    """CKA between features of `a` (rows) and of `b` (columns); both may be the same model."""

    a: str
    b: str
    data: str
    rows: tuple[str, ...]  # signals of a, in the order of the network
    columns: tuple[str, ...]  # signals of b
    values: NDArray[np.float64]  # (R, C), NaN where a feature is equal at all atoms
    n_systems: int
    n_atoms: int
    n_batches: int
    seed: int  # of the choice of systems and of the order of atoms
    a_weights_sha256: str = ""
    b_weights_sha256: str = ""

    @property
    def within(self) -> bool:
        """Whether the features of one model were compared with each other."""
        return (self.a, self.a_weights_sha256) == (self.b, self.b_weights_sha256)

    @property
    def title(self) -> str:
        """What was compared, in words."""
        return self.a if self.within else f"{self.a} and {self.b}"

    def text(self) -> str:
        """Return the table for a terminal."""
        columns = [Column(name, short_tap(name), decimals=3) for name in self.columns]
        rows: list[dict[str, object]] = [
            {"tap": short_tap(name), **{c: _cell(v) for c, v in zip(self.columns, values, strict=True)}}
            for name, values in zip(self.rows, self.values, strict=True)
        ]
        head = f"CKA of {self.title}" + ("" if self.within else f" (rows: {self.a})")
        size = f"{self.n_atoms:,} atoms of {self.n_systems:,} systems of {self.data}"
        return f"{head}; {size}\n{format_table(rows, [Column('tap', ''), *columns])}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; None stands for NaN."""
        values = [[_cell(v) for v in line] for line in self.values]
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return plain | {"rows": list(self.rows), "columns": list(self.columns), "values": values}

    def csv(self) -> str:
        """Return the table as CSV: a line a row, names first, nothing for NaN."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["tap", *self.columns])
        writer.writerows(
            [name, *("" if math.isnan(v) else f"{v:.6f}" for v in values)]
            for name, values in zip(self.rows, self.values, strict=True)
        )
        return text.getvalue()

    def save(self, path: Path) -> None:
        """Write to `path` (.json), whole or not at all."""
        write_atomic(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> "CKAResult":
        """Read what `save` wrote.

        Raises
        ------
        DataError
            If the file is damaged or was not written by `save`.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows, columns = (tuple(map(str, content[side])) for side in ("rows", "columns"))
            values = np.array(content["values"], dtype=np.float64)  # None becomes NaN
            if values.shape != (len(rows), len(columns)):
                raise ValueError(f"values {values.shape} for {len(rows)} rows and {len(columns)} columns")
            kinds = {f.name: f.type for f in fields(cls) if f.type in (int, str)}
            others: dict[str, Any] = {name: kind(content[name]) for name, kind in kinds.items()}
            return cls(rows=rows, columns=columns, values=values, **others)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}: not a readable comparison ({error}); remove it, `kd cka` makes it again"
            ) from None


def load_comparisons(run: Path) -> dict[str, CKAResult]:
    """Return the comparisons kept in a run folder by their names; empty if there are none."""
    return {path.stem: CKAResult.load(path) for path in sorted((run / FOLDER).glob("*.json"))}


def short_tap(name: str) -> str:
    """Return a signal's name as it is shown: U4 for layer/U4."""
    return name.removeprefix("layer/")


def _cell(value: float) -> float | None:
    return None if math.isnan(value) else float(value)

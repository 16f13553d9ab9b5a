"""What an evaluation leaves of one model on one data set, in one npz file: numbers, points to plot, tails."""

import io
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.pipeline.errors import DataError
from molkd.pipeline.evaluation.breakdown import Breakdown
from molkd.pipeline.evaluation.metrics import TERMS, Metrics
from molkd.pipeline.evaluation.tail import Tail
from molkd.pipeline.evaluation.throughput import Speed, Throughput
from molkd.pipeline.evaluation.worst import WorstSystem
from molkd.pipeline.files import write_atomic

_BESIDE_METRICS = ("systems_per_second", "weights_sha256", "data_fingerprint")
FOLDER = "evaluation"  # inside a run folder: evaluation/<data set>.npz


@dataclass(frozen=True, eq=False)
class Parity:
    """Predictions beside labels: a random sample of S systems and, on its own, of N labelled free atoms."""

    energy_pred: NDArray[np.float64]  # (S,) eV
    energy_label: NDArray[np.float64]  # (S,) eV
    n_atoms: NDArray[np.int64]  # (S,)
    forces_pred: NDArray[np.float64]  # (N, 3) eV/A
    forces_label: NDArray[np.float64]  # (N, 3) eV/A


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One model on one data set. What an older version did not measure is None or empty."""

    metrics: Metrics
    systems_per_second: float | None  # model time only, median over batches; None: not measured
    parity: Parity
    weights_sha256: str = ""  # of the model; empty: not known, so nothing shows that this is still its result
    data_fingerprint: str = ""  # of systems and labels, see `fingerprint.Fingerprint`
    throughput: Throughput | None = None  # the same with its spread and conditions
    end_to_end: Throughput | None = None  # from structures to results on the host; measured in turns only
    breakdowns: Mapping[str, Breakdown] = field(default_factory=dict)  # by kind
    energy_tail: Tail | None = None  # of |dE| in eV, over systems
    force_tail: Tail | None = None  # of |dF| in eV/A, over components of labelled free atoms
    worst: Mapping[str, Sequence[WorstSystem]] = field(default_factory=dict)  # by "energy" and "forces"

    def is_of(self, weights_sha256: str, data_fingerprint: str) -> bool:
        """Say whether this was measured with these weights on these systems and labels."""
        mine = (self.weights_sha256, self.data_fingerprint)
        return all(mine) and mine == (weights_sha256, data_fingerprint)

    @property
    def is_complete(self) -> bool:
        """Whether it holds all that this version measures; older ones kept no tails or breakdowns."""
        return bool(self.worst)

    def to_report(self) -> dict[str, float | None]:
        """Return the four reported metrics with units in their names, and systems_per_second."""
        found = {**self.metrics.to_report(), "systems_per_second": self.systems_per_second}
        return found | ({"end_to_end_per_second": self.end_to_end.median} if self.end_to_end else {})

    def with_speed(self, speed: Speed) -> "Evaluation":
        """Return this with a throughput that was measured in turns with other models."""
        return replace(
            self,
            systems_per_second=speed.model.median,
            throughput=speed.model,
            end_to_end=speed.end_to_end,
        )

    def save(self, path: Path) -> None:
        """Write to `path` (.npz), whole or not at all."""
        others = {name: getattr(self, name) for name in _BESIDE_METRICS}
        others |= {name: asdict(value) for name in _NESTED if (value := getattr(self, name)) is not None}
        others["worst"] = {by: [asdict(system) for system in systems] for by, systems in self.worst.items()}
        others["breakdowns"] = {kind: list(found.keys) for kind, found in self.breakdowns.items()}
        numbers = json.dumps({**asdict(self.metrics), **others})
        terms = {f"breakdown_{i}": found.terms for i, found in enumerate(self.breakdowns.values())}
        arrays: dict[str, Any] = {"numbers": np.array(numbers), **vars(self.parity), **terms}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        """Read what `save` wrote, in this or an older version.

        Raises
        ------
        DataError
            If the file is damaged or was not written by `save`.
        """
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                numbers = json.loads(str(file["numbers"]))
                parity = Parity(**{name: file[name] for name in Parity.__dataclass_fields__})
                kinds = numbers.pop("breakdowns", {})
                terms = [file[f"breakdown_{i}"] for i in range(len(kinds))]
            breakdowns = {
                kind: _breakdown(kind, keys, rows)
                for (kind, keys), rows in zip(kinds.items(), terms, strict=True)
            }
            others: dict[str, Any] = {name: numbers.pop(name) for name in _BESIDE_METRICS if name in numbers}
            others |= {name: read(numbers.pop(name)) for name, read in _NESTED.items() if name in numbers}
            worst = {
                by: [WorstSystem(**system) for system in systems]
                for by, systems in numbers.pop("worst", {}).items()
            }
            given = {"systems_per_second": None, **others, "breakdowns": breakdowns, "worst": worst}
            return cls(Metrics(**numbers), parity=parity, **given)
        except (
            OSError,
            EOFError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            MemoryError,  # an array that claims to be larger than any memory
            RuntimeError,  # an unknown compression, a password, JSON that is nested too deep
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise DataError(
                f"{path}: not a readable evaluation ({error}); remove it, `kd report` measures again"
            ) from None


def _breakdown(kind: str, keys: Sequence[str], terms: NDArray[np.float64]) -> Breakdown:
    if terms.shape != (len(keys), len(TERMS)):
        raise ValueError(f"{kind}: {len(keys)} groups, but an array of shape {terms.shape}")
    return Breakdown(kind, tuple(keys), terms)


def _tail(plain: dict[str, Any]) -> Tail:
    return Tail(**{**plain, "quantiles": tuple(plain["quantiles"])})


_NESTED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "throughput": Throughput.from_dict,
    "end_to_end": Throughput.from_dict,
    "energy_tail": _tail,
    "force_tail": _tail,
}


def load_evaluations(run: Path) -> dict[str, Evaluation]:
    """Return the evaluations kept in a run folder by the name of their data set; empty if there are none."""
    return {path.stem: Evaluation.load(path) for path in sorted((run / FOLDER).glob("*.npz"))}

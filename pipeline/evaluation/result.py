"""What an evaluation leaves: metrics, throughput and points for parity plots, one npz file per data set."""

import io
import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from molkd.pipeline.errors import DataError
from molkd.pipeline.evaluation.metrics import Metrics
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
    """One model on one data set."""

    metrics: Metrics
    systems_per_second: float | None  # model time only, warm, median over batches; None: not measured
    parity: Parity
    weights_sha256: str = ""  # of the model; empty: not known, so nothing shows that this is still its result
    data_fingerprint: str = ""  # of systems and labels, see `fingerprint.Fingerprint`

    def is_of(self, weights_sha256: str, data_fingerprint: str) -> bool:
        """Say whether this was measured with these weights on these systems and labels."""
        mine = (self.weights_sha256, self.data_fingerprint)
        return all(mine) and mine == (weights_sha256, data_fingerprint)

    def to_report(self) -> dict[str, float | None]:
        """Return the four reported metrics with units in their names, and systems_per_second."""
        return {**self.metrics.to_report(), "systems_per_second": self.systems_per_second}

    def save(self, path: Path) -> None:
        """Write to `path` (.npz), whole or not at all."""
        others = {name: getattr(self, name) for name in _BESIDE_METRICS}
        numbers = json.dumps({**asdict(self.metrics), **others})
        buffer = io.BytesIO()
        np.savez_compressed(buffer, numbers=np.array(numbers), **vars(self.parity))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        """Read what `save` wrote.

        Raises
        ------
        DataError
            If the file is damaged or was not written by `save`.
        """
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                numbers = json.loads(str(file["numbers"]))
                parity = Parity(**{name: file[name] for name in Parity.__dataclass_fields__})
            others = {name: numbers.pop(name) for name in _BESIDE_METRICS if name in numbers}
            return cls(Metrics(**numbers), parity=parity, **{"systems_per_second": None, **others})
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{path}: not a readable evaluation ({error}); remove it, `kd report` measures again"
            ) from None


def load_evaluations(run: Path) -> dict[str, Evaluation]:
    """Return the evaluations kept in a run folder by the name of their data set; empty if there are none."""
    return {path.stem: Evaluation.load(path) for path in sorted((run / FOLDER).glob("*.npz"))}

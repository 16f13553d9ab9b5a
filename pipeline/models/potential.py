"""A model with the units it was trained in: weights, label scale and provenance in one safetensors file."""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from molkd.pipeline.data.references import LabelScale, reference_table
from molkd.pipeline.errors import ConfigError, DataError, ModelError
from molkd.pipeline.files import write_atomic
from molkd.pipeline.graphs.batch import Batch
from molkd.pipeline.graphs.neighbors import NeighborRule
from molkd.pipeline.models.registry import build_model

FORMAT = 1
_METADATA_KEY = "molkd"


@dataclass(eq=False)
class Potential:
    """Energy in eV and forces in eV/A from a model that was trained on normalised labels."""

    model: Any  # nn.Module that follows interface.Model
    scale: LabelScale
    metadata: dict[str, Any] = field(default_factory=dict)  # model (config), scale, provenance
    weights_sha256: str = ""
    _tables: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def neighbor_rule(self) -> NeighborRule:
        """The rule that batches for this potential must be built with."""
        rule: NeighborRule = self.model.neighbor_rule
        return rule

    @property
    def elements(self) -> frozenset[int]:
        """Atomic numbers seen in training, or all that the embedding has a row for."""
        seen = self.metadata.get("provenance", {}).get("elements")
        return frozenset(seen or range(1, int(self.model.max_atomic_number) + 1))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        parameter: Tensor = next(self.model.parameters())
        return parameter.device

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Potential":
        """Move the model; the label scale stays in float64 on the host."""
        self.model.to(device=device, dtype=dtype)
        return self

    def predict(self, batch: Batch, taps: Collection[str] = (), *, forces: bool = True) -> dict[str, Tensor]:
        """Return energy (S,), atomic_energies (N,) in eV (float64), forces (N, 3) in eV/A, and features."""
        out = dict(self.model(batch, taps, forces=forces))
        references = self._reference_table(batch.positions.device)[batch.atomic_numbers]  # (N,)
        n_atoms = batch.atoms_ptr.diff()
        offset = references.new_zeros(batch.n_systems).index_add(0, batch.system_idx, references)
        out["energy"] = out["energy"].double() * self.scale.energy_std + self.scale.energy_mean + offset
        # The mean is per system; each atom carries an equal part, so that atomic energies sum to the energy.
        share = (self.scale.energy_mean / n_atoms.double())[batch.system_idx]  # int / float would be float32
        out["atomic_energies"] = out["atomic_energies"].double() * self.scale.energy_std + references + share
        if "forces" in out:
            out["forces"] = out["forces"] * self.scale.forces_std
        return out

    def _reference_table(self, device: torch.device) -> Tensor:
        """Return the references (119,) in eV; copied to a device once, a copy per call would wait for it."""
        if device not in self._tables:
            self._tables[device] = torch.from_numpy(reference_table(self.scale.references)).to(device)
        return self._tables[device]

    def save(self, path: Path) -> None:
        """Write weights and metadata to `path` (.safetensors), whole or not at all."""
        # Aliased entries (SchNet's filters) are stored twice: safetensors has no aliases.
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in self.model.state_dict().items()}
        content = {"format": FORMAT, **self.metadata, "scale": self.scale.to_dict()}
        write_atomic(path, safetensors_bytes(tensors, {_METADATA_KEY: json.dumps(content, sort_keys=True)}))

    @classmethod
    def load(cls, path: Path | str, device: torch.device | str = "cpu") -> "Potential":
        """Read a model file, or the `best.safetensors` of a run folder; nothing in it is executed.

        Raises
        ------
        ModelError
            If the file is missing, damaged, of a newer format, or does not fit its own configuration.
        """
        path = Path(path)
        path = path / "best.safetensors" if path.is_dir() else path
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(_METADATA_KEY)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise ModelError(
                f"{path}: no such model file; give a .safetensors file or a run folder"
            ) from None
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: not a readable safetensors file ({error}); copy it again") from None
        if text is None:
            raise ModelError(
                f"{path}: no molkd metadata inside; only files written by `kd train-student` fit here"
            )
        metadata = _parse(text, path)
        if metadata.get("format") != FORMAT:
            raise ModelError(
                f"{path}: model format {metadata.get('format')}, this version reads {FORMAT}; upgrade molkd"
            )
        try:
            model = build_model(metadata["model"])
            scale = LabelScale.from_dict(metadata.pop("scale"))
        except (ConfigError, DataError, KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ModelError(
                f"{path}: its metadata do not describe a model ({reason}); copy the file again"
            ) from None
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ModelError(f"{path}: weights do not fit the configuration in the file: {error}") from None
        model.eval().to(device)
        return cls(model, scale, metadata, hashlib.sha256(path.read_bytes()).hexdigest())


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: damaged metadata ({error}); copy the file again") from None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("provenance", {}), dict):
        raise ModelError(f"{path}: its metadata do not describe a model; copy the file again")
    return metadata

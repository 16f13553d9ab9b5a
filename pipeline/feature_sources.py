"""Where features of atoms come from: a model that is run, or a teacher's signals in a store."""

import difflib
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from molkd.cache_schema.fields import FieldSpec
from molkd.cache_schema.reader import Cache
from molkd.pipeline.data.system import System
from molkd.pipeline.errors import CacheError, ConfigError, ModelError
from molkd.pipeline.graphs.batch import batch_from_systems, to_device
from molkd.pipeline.scope import Scope
from molkd.pipeline.teachers.load import load_teacher

_LAST = ("node", "e2n", "v2v")  # what stands behind the layers


class FeatureSource(Protocol):
    """Features of the atoms of any system that the source knows."""

    name: str
    origin: str  # as the user named it: tells sources of one name apart
    weights_sha256: str  # of the model that computes or computed them
    features: dict[str, FieldSpec]  # by signal, in the order of the network

    def ids(self, taps: Sequence[str]) -> Set[bytes] | None:
        """Return the systems that have these features; None if any system can have them."""
        ...

    def check(self, system: System) -> None:
        """Raise ModelError if the model was not made for a system."""
        ...

    def read(self, systems: Sequence[System], taps: Sequence[str]) -> list[Tensor]:
        """Return each feature (N, ...) of the atoms of these systems, float32 on the host."""
        ...


class ModelFeatures:
    """A run folder, a model file or any teacher, computed when asked."""

    def __init__(self, model: str, device: torch.device, scale_file: Path | None = None) -> None:
        self._teacher = load_teacher(model, device=device, scale_file=scale_file)
        info = self._teacher.info
        self.name, self.origin, self.weights_sha256 = info.name, model, info.weights_sha256
        self.features = _features(self._teacher.signals)
        self._scope = Scope(info.name, self._teacher.atomic_numbers, self._teacher.neighbor_rule)

    def ids(self, taps: Sequence[str]) -> Set[bytes] | None:  # noqa: ARG002
        """Return None: any system can be computed, if it is in the model's scope."""
        return None

    def check(self, system: System) -> None:
        """Raise ModelError if the model was not made for a system."""
        self._scope.check(system)

    def read(self, systems: Sequence[System], taps: Sequence[str]) -> list[Tensor]:
        """Return each feature (N, ...), computed in one batch.

        Raises
        ------
        ModelError
            If a feature is not finite; a system is named.
        """
        batch = to_device(batch_from_systems(systems, self._teacher.neighbor_rule), self._teacher.device)
        out = self._teacher.compute(batch, taps)
        found = [out[tap].detach().float().cpu() for tap in taps]
        for tap, values in zip(taps, found, strict=True):
            finite = torch.isfinite(values.flatten(1)).all(1)
            if not finite.all():
                system = systems[int(batch.system_idx.cpu()[~finite][0])]
                raise ModelError(
                    f"{system.source}: {tap} of {self.name} is not finite; look at this structure"
                )
        return found


class StoredFeatures:
    """The signals of a teacher in a store; neither its weights nor its code are needed.

    Raises
    ------
    CacheError
        If the store has no such teacher.
    ConfigError
        If it has several and none is named.
    """

    def __init__(self, cache: Cache, teacher: str | None) -> None:
        names = sorted(cache.teachers)
        if not names:
            raise CacheError(f"{cache.path}: no teacher in this store; run kd cache-teacher on it first")
        if teacher is None and len(names) > 1:
            raise ConfigError(
                f"{cache.path}: several teachers ({', '.join(names)}); choose one with --teacher"
            )
        self._cache, self.name = cache, teacher or names[0]
        self.origin = f"{self.name} in {Path(cache.path).name}"
        if self.name not in names:
            raise CacheError(f"{cache.path}: no teacher {teacher}; it has {', '.join(names)}")
        entry = cache.teachers[self.name]
        self.weights_sha256 = str(entry.provenance.get("weights_sha256", ""))
        self.features = _features({name: signal.spec for name, signal in entry.signals.items()})
        self._rows: dict[bytes, int] = {}

    def ids(self, taps: Sequence[str]) -> Set[bytes]:
        """Return the systems whose features are written and finite."""
        signals = self._cache.teachers[self.name].signals
        missing = {shard for tap in taps for shard in signals[tap].missing_shards}
        bad = set(self._cache.bad_systems(self.name).tolist())
        shards = self._cache.systems.shard.tolist()
        self._rows = {
            row.tobytes(): i
            for i, (row, shard) in enumerate(zip(self._cache.ids, shards, strict=True))
            if shard not in missing and i not in bad
        }
        return self._rows.keys()

    def check(self, system: System) -> None:
        """Accept every system: `ids` says what is there."""

    def read(self, systems: Sequence[System], taps: Sequence[str]) -> list[Tensor]:
        """Return each signal (N, ...), decoded, of systems that `ids` named for these taps."""
        rows = [self._rows[system.id] for system in systems]
        values = self._cache.read(rows, (), teacher=self.name, signals=tuple(taps))
        return [torch.from_numpy(values[f"teacher/{tap}"]).float() for tap in taps]


def choose_taps(source: FeatureSource, asked: Sequence[str]) -> tuple[str, ...]:
    """Return signals of a source: those asked for, `U4` for `layer/U4`; by default scalar layers and `node`.

    Vectors say little about scalars, nothing where orientations are random: they are left to be asked for.
    A source that has neither layers nor `node` gives what features it has.

    Raises
    ------
    ConfigError
        If it has no such feature, with the nearest one that it has, or none at all.
    """
    offered = source.features
    if not offered:
        raise ConfigError(
            f"{source.name}: gives no features of atoms; a store gets some with "
            "kd cache-teacher --signals node"
        )
    if not asked:
        scalars = [name for name, spec in offered.items() if spec.symmetry == "invariant"]
        return tuple(n for n in scalars if n.startswith("layer/") or n == "node") or tuple(offered)
    return tuple(dict.fromkeys(_find(name, source.name, offered) for name in asked))


def _find(name: str, of: str, offered: Mapping[str, FieldSpec]) -> str:
    for candidate in (name, f"layer/{name}"):
        if candidate in offered:
            return candidate
    short = [tap.removeprefix("layer/") for tap in offered]
    nearest = difflib.get_close_matches(name.removeprefix("layer/"), short, n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"{of}: no features {name}; did you mean {nearest}? valid taps: {', '.join(short)}; "
        "give the second model its own with --taps-b"
    )


def _features(signals: Mapping[str, FieldSpec]) -> dict[str, FieldSpec]:
    """Return the features of atoms in the order of the network: layers by their numbers, then the rest."""
    found = [n for n, s in signals.items() if s.axis == "atom" and s.shape and n != "forces"]
    return {name: signals[name] for name in sorted(found, key=_depth)}


def _depth(name: str) -> tuple[int, int, str]:
    if not name.startswith("layer/"):
        return 1, _LAST.index(name) if name in _LAST else len(_LAST), name
    number = re.search(r"\d+", name)
    return 0, int(number.group()) if number else 0, name

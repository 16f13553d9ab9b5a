"""Structures and labels of broken shards, read again from the files that the store was made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.creation import LABELS_SHA256
from molkd.cache_schema.damage import Damage, DamagedStore, Outcome
from molkd.cache_schema.fields import ATOM_FIELDS
from molkd.cache_schema.groups import ATOMS, load_atoms, load_commit
from molkd.cache_schema.identity import labels_digest, labels_fingerprint
from molkd.cache_schema.mending import MendingStore, OtherValuesError
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.state import GroupState
from molkd.pipeline.data.sources import Source, open_sources
from molkd.pipeline.data.system import System
from molkd.pipeline.progress import Progress

Place = tuple[int, int]  # number of a source, and of a system in it


@dataclass(frozen=True)
class DataHealer:
    """Finds the systems of broken shards in data, by their ids.

    Attributes
    ----------
    data : files, folders, stores or URLs
    energy_key, forces_key : names of the labels in them
    """

    data: Sequence[str | Path]
    energy_key: str | None = None
    forces_key: str | None = None

    @property
    def name(self) -> str:
        """What the user called it."""
        return ", ".join(str(one) for one in self.data)

    def mend(
        self, store: DamagedStore, damages: Sequence[Damage], outcome: Outcome
    ) -> dict[tuple[str, int], str]:
        """Write the shards of structures again; return why not, for those it cannot.

        Raises
        ------
        DataError
            If the data cannot be read.
        CacheError
            If the store cannot be written.
        """
        reasons = {d.key: "" for d in damages if d.group != ATOMS}
        mine = [d for d in damages if d.group == ATOMS]
        if not mine:
            return reasons
        sources = open_sources(self.data, energy_key=self.energy_key, forces_key=self.forces_key)
        try:
            return reasons | _Filling(store, sources, mine, self.name).mend(outcome)
        finally:
            for source in sources:
                source.close()


class _Filling:
    """Looks for the systems of broken shards and writes them."""

    def __init__(
        self, store: DamagedStore, sources: Sequence[Source], damages: Sequence[Damage], name: str
    ) -> None:
        self.store, self.sources, self.damages, self.name = store, sources, damages, name
        self.places = self._find()

    def mend(self, outcome: Outcome) -> dict[tuple[str, int], str]:
        reasons = {}
        mending = (
            None if outcome.is_dry else MendingStore.of(self.store.root, self.store.references(), (ATOMS,))
        )
        vouched = all(d.reference is not None for d in self.damages) or self._labels_agree()
        for damage in self.damages:
            systems = self.store.systems.in_shard(damage.shard)
            n_absent = sum(i not in self.places for i in systems)
            if n_absent:
                reasons[damage.key] = f"{n_absent} of its {len(systems)} systems are not in {self.name}"
            elif damage.reference is None and not vouched:
                reasons[damage.key] = f"{self.name} has other labels, tags or fixed atoms than the store had"
            elif mending is None:
                outcome.did_shard(damage, self.name)
            else:
                try:
                    with mending.shard_writer(ATOMS, damage.shard) as writer:
                        for i in systems:
                            writer.write(_rows(self._read(i)))
                    outcome.did_shard(damage, self.name, writer.n_bytes)
                except OtherValuesError:
                    reasons[damage.key] = (
                        f"{self.name} has other labels, tags or fixed atoms than the store had"
                    )
        return reasons

    def _find(self) -> dict[int, Place]:
        """Return where in the data the systems of broken shards are, by stored index."""
        systems = self.store.systems
        wanted = {systems.id[i].tobytes(): i for d in self.damages for i in systems.in_shard(d.shard)}
        places: dict[int, Place] = {}
        with Progress(sum(len(source) for source in self.sources), "search", "system") as progress:
            for k, source in enumerate(self.sources):
                for row in range(len(source)):
                    progress.update()
                    system = source.read(row)
                    i = wanted.get(system.id)
                    if i is not None and i not in places and self._has_label(system, i):
                        places[i] = (k, row)
        return places

    def _has_label(self, system: System, index: int) -> bool:
        """Say whether the energy is the store's; a store without it may have been made without labels."""
        known = self.store.systems.energy[index]
        return bool(np.isnan(known) or known == system.energy)

    def _read(self, index: int) -> System:
        source, row = self.places[index]
        return self.sources[source].read(row)

    def _labels_agree(self) -> bool:
        """Compare the labels of all systems, those of broken shards from the data, with the store's hash."""
        plan, systems, root = self.store.plan, self.store.systems, self.store.root
        known = plan.dataset.get(LABELS_SHA256)
        if known is None:
            return True
        state = GroupState(load_atoms(plan, systems), root)
        for shard in set(range(plan.n_shards)) - {d.shard for d in self.damages}:
            commit = load_commit(root, plan, state.group, shard)
            assert commit is not None
            state.add(commit)
        digests = []
        with Cache(root, plan, systems, {ATOMS: state}) as cache:
            for i in range(plan.packing.n_systems):
                if int(systems.shard[i]) in state.files:
                    rows = cache.read([i], tuple(ATOM_FIELDS))
                elif i in self.places:
                    rows = _rows(self._read(i))
                else:
                    return False
                energy = float(systems.energy[i])
                digests.append(labels_digest(energy, rows["forces"], rows["tags"], rows["fixed"]))
        return bool(labels_fingerprint(systems.id, digests) == known)


def _rows(system: System) -> dict[str, NDArray[Any]]:
    return {name: getattr(system, name) for name in ATOM_FIELDS}

"""The structures made so far, on disk: what a run that was cut off goes on from.

A folder beside the store holds `structures.extxyz`, one frame a structure with its origin, and
`progress.json`, written after each chunk: how many starts are done and how long the file was then. What
stands behind that length is of a chunk that was not finished, and is cut off.
"""

import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from ase import Atoms
from ase.io.extxyz import read_xyz, write_extxyz

from molkd.cache_schema.files import exclusive
from molkd.pipeline.augment.frame import Frame
from molkd.pipeline.data.ase_source import record_from_atoms
from molkd.pipeline.data.records import PARSER_ERRORS, build_system
from molkd.pipeline.errors import ConfigError, DataError
from molkd.pipeline.files import write_atomic

SUMMED = {"discrepancy_at_start", "discrepancy"}  # facts of frames whose means the summary gives
_ORIGIN = "augmentation"  # key in a frame's comment line
_PARENT = re.compile(r"parent\W+([0-9a-f]{32})")  # in it


@dataclass
class Progress:
    """What has been done."""

    recipe: dict[str, Any]  # everything that the structures depend on
    n_done: int = 0  # starts
    n_frames: int = 0
    n_bytes: int = 0  # of structures.extxyz
    n_made: int = 0  # structures before sifting
    dropped: dict[str, int] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)  # of SUMMED over the structures kept

    def count(self, kept: Sequence[Frame], dropped: Mapping[str, int]) -> None:
        """Add what was dropped in a chunk, and numbers of what was kept."""
        self.dropped = dict(sorted((Counter(self.dropped) + Counter(dropped)).items()))
        for frame in kept:
            for key in SUMMED & frame.made.keys():
                self.sums[key] = self.sums.get(key, 0.0) + float(frame.made[key])


class Record:
    """The folder of a run."""

    def __init__(self, store: Path) -> None:
        self.folder = store.with_name(store.name + ".augment")
        self.structures = self.folder / "structures.extxyz"
        self._progress = self.folder / "progress.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and let one process at a time work in it; others wait."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{self.folder}: cannot be made ({error.strerror}); choose another place"
            ) from None
        with exclusive(self.folder):
            yield

    def resume(self, recipe: dict[str, Any]) -> Progress:
        """Return what has been done by the same recipe, the file cut to it.

        Raises
        ------
        ConfigError
            If the folder holds structures of another recipe; nothing is touched.
        DataError
            If what is there is damaged.
        """
        if not self._progress.exists():
            self.structures.unlink(missing_ok=True)
            return Progress(recipe)
        try:
            found = Progress(**json.loads(self._progress.read_text()))
            size = self.structures.stat().st_size if self.structures.exists() else 0
            if size < found.n_bytes:
                raise ValueError(f"{self.structures.name} has {size} of {found.n_bytes} bytes")
        except (OSError, TypeError, ValueError) as error:
            raise DataError(f"{self.folder}: is damaged ({error}); remove it to start over") from None
        require_same(self.folder, found.recipe, recipe)
        if size > found.n_bytes:
            os.truncate(self.structures, found.n_bytes)
        return found

    def add(self, frames: Sequence[Frame], progress: Progress) -> None:
        """Write the structures of a chunk, then what has been done with it."""
        text = "".join(map(_to_text, frames)).encode()
        with self.structures.open("ab") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        progress.n_bytes += len(text)
        progress.n_frames += len(frames)
        write_atomic(self._progress, json.dumps(asdict(progress), indent=1, sort_keys=True) + "\n")

    def frames(self) -> Iterator[Frame]:
        """Yield every structure written."""
        if not self.structures.exists():
            return
        with closing(self.structures.open(encoding="utf-8")) as file:
            try:
                for k, atoms in enumerate(read_xyz(file, index=slice(None))):
                    yield _from_atoms(atoms, f"{self.structures.name}#{k}")
            except PARSER_ERRORS as error:
                raise DataError(f"{self.structures}: is damaged ({error}); remove {self.folder}") from None

    def parents(self) -> list[str]:
        """Return the id of each structure's parent in hex, empty where it has none."""
        with self.structures.open(encoding="utf-8") as file:
            found = [_PARENT.search(comment) for comment in _comments(file)]
        return [match[1] if match else "" for match in found]


def _comments(file: IO[str]) -> Iterator[str]:
    """Yield the comment lines of an extxyz file, the atoms skipped."""
    while line := file.readline():
        yield file.readline()
        for _ in islice(file, int(line)):
            pass


def require_same(where: Path, known: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to go on with structures that were made otherwise.

    Raises
    ------
    ConfigError
        Naming what differs.
    """
    keys = sorted(known.keys() | wanted.keys())
    differ = [key for key in keys if known.get(key) != wanted.get(key)]
    if differ:
        raise ConfigError(
            f"{where}: holds structures that were made otherwise ({', '.join(differ)}); "
            "choose another name for the store, or remove it to start over"
        )


def _to_text(frame: Frame) -> str:
    system = frame.system
    atoms = Atoms(system.atomic_numbers, system.positions, cell=system.cell, pbc=system.pbc)
    atoms.set_array("tags", system.tags.astype(int))
    atoms.set_array("fixed", system.fixed)
    # One entry, no number of its own: readers would ask whether it is an energy label.
    atoms.info = {
        _ORIGIN: {**frame.made, "teacher_energy": frame.energy, "largest_force": frame.largest_force}
    }
    text = io.StringIO()
    write_extxyz(text, [atoms])
    return text.getvalue()


def _from_atoms(atoms: Atoms, source: str) -> Frame:
    made = dict(atoms.info[_ORIGIN])
    energy, largest_force = made.pop("teacher_energy"), made.pop("largest_force")
    return Frame(build_system(record_from_atoms(atoms), (), (), source), made, energy, largest_force)

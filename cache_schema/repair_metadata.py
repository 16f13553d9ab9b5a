"""Plan, systems table and metadata of a damaged store: made again from what is left, or taken from a copy.

Every one of these files has a sha256 that another file vouches for, so it does not matter where the bytes
come from: what has the sha256 is what was there.
"""

import contextlib
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from molkd.cache_schema import zarr_json
from molkd.cache_schema.codebook import MAX_PCA_CHANNELS
from molkd.cache_schema.creation import metadata_files
from molkd.cache_schema.damage import Outcome
from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.files import inside, make_folder, write_error, write_file
from molkd.cache_schema.groups import (
    ATOMS,
    declared_layout,
    list_logged_groups,
    list_logged_teachers,
    load_signal,
    read_zarr_json,
    teacher_provenance,
)
from molkd.cache_schema.jsonfile import read_sealed
from molkd.cache_schema.layout import (
    DATA,
    LOG,
    MANIFEST,
    MAX_JSON_BYTES,
    MAX_RECORD_BYTES,
    PLAN,
    pack,
    split_signal_group,
)
from molkd.cache_schema.mending import clear_way
from molkd.cache_schema.plan import (
    SYSTEM_ARRAYS,
    Plan,
    Systems,
    read_plan,
    read_system_array,
    read_systems,
    system_file,
)
from molkd.cache_schema.repair_copy import IntactCopy
from molkd.cache_schema.signal import codebook_of, read_signal
from molkd.cache_schema.state import most_manifest_bytes
from molkd.cache_schema.untrusted import is_hollow, open_regular

_BOOK_BYTES = 4 * MAX_PCA_CHANNELS**2  # of the largest file of a codebook
_SOURCE = "give an intact copy of the store (--from)"

Candidates = Iterable[tuple[str, bytes]]  # where bytes come from, and the bytes
Votes = defaultdict[str, Counter[tuple[tuple[str, str], ...]]]  # group -> files and sha256 -> records
T = TypeVar("T", str, bytes)


def mend_plan(root: Path, copy: IntactCopy | None, outcome: Outcome) -> Plan | None:
    """Return the plan, that of the copy if the store's own is damaged; None if there is none to be had.

    Raises
    ------
    CacheError
        If the folder is no store, or one of a newer format.
    """
    try:
        return read_plan(root)
    except IntegrityError as error:
        reason = str(error)
    except CacheError:
        if (root / PLAN).is_file() or not (root / DATA).is_dir():
            raise
        reason = f"{root / PLAN}: missing"
    if copy is None:
        outcome.needed.append(f"{reason}; {_SOURCE}")
        return None
    known = _plans_named(root, copy.plan)
    if known != {copy.plan.sha256}:
        why = "its records name another plan" if known else "no record is left to tell that it is one"
        outcome.needed.append(f"{reason}; {copy.name} is no copy of this store: {why}; {_SOURCE}")
        return None
    _put(root, PLAN, copy.read_plan_file(), copy.name, outcome)
    return copy.plan


def mend_table(root: Path, plan: Plan, copy: IntactCopy | None, outcome: Outcome) -> Systems | None:
    """Return the systems table once all files that the plan vouches for are whole; None if one is not."""
    n_needed = len(outcome.needed)
    for name, digest in plan.systems.items():
        relative = system_file(name)
        n_bytes = plan.packing.n_systems * _row_bytes(name)
        candidates = [*_table_candidates(root, plan, name), *_copied(copy, relative, n_bytes)]
        _mend(root, relative, digest, candidates, outcome)
    generated = metadata_files(plan.packing, ())
    for name, digest in plan.metadata.items():
        own = [("the plan", generated[name])] if name in generated else []
        _mend(root, f"{DATA}/{name}", digest, [*own, *_copied(copy, f"{DATA}/{name}")], outcome)
    if len(outcome.needed) > n_needed:
        return None
    if not outcome.is_dry:
        return read_systems(root, plan)
    try:
        return read_systems(root, plan)
    except IntegrityError:
        return None  # what comes after it is seen when it is there


def mend_signals(
    root: Path, plan: Plan, systems: Systems, copy: IntactCopy | None, outcome: Outcome
) -> list[str]:
    """Put metadata and codebooks of all signals in place and return the groups that can be looked into."""
    recorded, teachers = recorded_metadata(root, plan)
    recorded |= _unrecorded(root, plan, systems, copy, recorded)
    readable = []
    for group in sorted(recorded):
        digests = {f"{DATA}/{name}": digest for name, digest in recorded[group].items()}
        for _ in range(3):  # what is whole now tells what the next files were
            made, codebook = _remade(root, plan, systems, group, teachers)
            digests |= codebook
            for relative, digest in digests.items():
                own = [("the rest of the store", made[relative])] if relative in made else []
                _mend(
                    root,
                    relative,
                    digest,
                    [*own, *_copied(copy, relative, _BOOK_BYTES)],
                    outcome,
                    is_final=False,
                )
        for relative, digest in digests.items():
            _mend(root, relative, digest, (), outcome)
        try:
            load_signal(root, plan, systems, group)
            readable.append(group)
        except CacheError as error:
            if all(_is_there(root, relative, digest) for relative, digest in digests.items()):
                outcome.needed.append(f"{group}: {error}")
    return readable


def _unrecorded(
    root: Path, plan: Plan, systems: Systems, copy: IntactCopy | None, recorded: Collection[str]
) -> dict[str, dict[str, str]]:
    """Return what the copy says about signals without a value, whose description here is damaged.

    No record vouches for these; as nothing depends on them either, the copy is believed.
    """
    found = {}
    for group, digests in copy.signals(systems).items() if copy is not None else ():
        teacher = f"teachers/{split_signal_group(group)[0]}"
        with contextlib.suppress(CacheError):
            if group in recorded or not inside(root, f"{DATA}/{group}").is_dir():
                continue
        try:
            load_signal(root, plan, systems, group)
        except CacheError:
            described = f"{teacher}/zarr.json"
            if not _is_described(root, teacher) or _is_there(root, f"{DATA}/{described}", digests[described]):
                found[group] = digests
    return found


def _is_described(root: Path, teacher: str) -> bool:
    try:
        return teacher_provenance(root, teacher.rpartition("/")[2]) is not None
    except CacheError:
        return False


def recorded_metadata(root: Path, plan: Plan) -> tuple[dict[str, dict[str, str]], dict[str, Any]]:
    """Return what records and manifest say about signals.

    Returns
    -------
    For each group the sha256 of its zarr.json files, as most of its records say; and the provenance of
    teachers that the manifest tells.
    """
    votes: Votes = defaultdict(Counter)
    for document in _sealed_files(root):
        if document.get("plan_sha256") == plan.sha256 and isinstance(document.get("group"), str):
            _vote(votes, document["group"], document.get("metadata"))
    manifest = _read_sealed(root, MANIFEST, most_manifest_bytes(plan))
    teachers: dict[str, Any] = {}
    if manifest is not None and manifest.get("plan_sha256") == plan.sha256:
        groups, found = manifest.get("groups"), manifest.get("teachers")
        teachers = found if isinstance(found, dict) else {}
        for group, entry in groups.items() if isinstance(groups, dict) else ():
            _vote(votes, group, entry.get("metadata") if isinstance(entry, dict) else None)
    return {group: dict(counter.most_common(1)[0][0]) for group, counter in votes.items()}, teachers


def _vote(votes: Votes, group: str, digests: object) -> None:
    try:
        split_signal_group(group)
    except (CacheError, ValueError):
        return
    if isinstance(digests, dict) and all(
        isinstance(digest, str) and name.startswith("teachers/") and name.endswith("/zarr.json")
        for name, digest in digests.items()
    ):
        votes[group][tuple(sorted(digests.items()))] += 1


def _remade(
    root: Path, plan: Plan, systems: Systems, group: str, teachers: dict[str, Any]
) -> tuple[dict[str, bytes], dict[str, str]]:
    """Return files of a signal that follow from others, and the sha256 of its codebook's."""
    parts = group.split("/")
    documents = {
        "/".join(parts[:k]): zarr_json.dump(zarr_json.group_document({})) for k in range(3, len(parts))
    }
    if isinstance(teachers.get(parts[1]), dict):
        attributes = zarr_json.teacher_attributes(parts[1], teachers[parts[1]])
        documents["/".join(parts[:2])] = zarr_json.dump(zarr_json.group_document(attributes))
    made = {f"{name}/zarr.json": raw for name, raw in documents.items()}
    codebook: dict[str, str] = {}
    try:
        raw, where = read_zarr_json(root, f"{group}/zarr.json") or b"", str(root / DATA / group)
        document = zarr_json.parse(raw, where)
        more, codebook = codebook_of(group, zarr_json.read_signal(document, where)[2])
        made |= more
        signal = read_signal(
            root, group, document, where, lambda name: (zarr_json.parse(more[name], where), where)
        )
        for layout in declared_layout(group, signal, plan, systems).values():
            made[f"{layout.path}/zarr.json"] = zarr_json.dump(zarr_json.array_document(layout))
    except CacheError:
        pass  # of what is still damaged nothing can be told
    return _in_data(made), _in_data(codebook)


def _in_data(files: Mapping[str, T]) -> dict[str, T]:
    return {f"{DATA}/{name}": content for name, content in files.items()}


def _table_candidates(root: Path, plan: Plan, name: str) -> Candidates:
    """Yield what a systems array can be made of: places follow from sizes."""
    if name not in ("shard", "row", "slot"):
        return
    try:
        read_system_array(root, plan, "id")  # else how many there are is a claim
        n_atoms = read_system_array(root, plan, "n_atoms")
    except IntegrityError:
        return
    if n_atoms.min() < 1 or n_atoms.max() > plan.packing.rows_per_shard:
        return  # what the plan vouches for is wrong
    _, places = pack(n_atoms, plan.packing.rows_per_shard)
    dtype = np.dtype(SYSTEM_ARRAYS[name][0]).newbyteorder("<")
    yield "the numbers of atoms", getattr(places, name).astype(dtype).tobytes()


def _copied(copy: IntactCopy | None, relative: str, max_bytes: int = MAX_JSON_BYTES) -> Candidates:
    if copy is not None:
        for raw in copy.small_files(relative, max_bytes):
            yield copy.name, raw


def _mend(
    root: Path, relative: str, digest: str, candidates: Candidates, outcome: Outcome, *, is_final: bool = True
) -> None:
    """Put a file in place unless it is there; note it as needed if no candidate has the right sha256."""
    if _is_there(root, relative, digest):
        return
    for source, raw in candidates:
        if hashlib.sha256(raw).hexdigest() == digest:
            _put(root, relative, raw, source, outcome)
            return
    if is_final and not any(one.startswith(f"{relative}: ") for one in (*outcome.done, *outcome.needed)):
        outcome.needed.append(f"{relative}: damaged or missing; {_SOURCE}")


def _is_there(root: Path, relative: str, digest: str) -> bool:
    try:
        path = inside(root, relative)
        if not path.is_file():
            return False
        with os.fdopen(open_regular(path), "rb") as handle:
            return (
                not is_hollow(handle.fileno()) and hashlib.file_digest(handle, "sha256").hexdigest() == digest
            )
    except (IntegrityError, OSError):
        return False


def _put(root: Path, relative: str, raw: bytes, source: str, outcome: Outcome) -> None:
    if any(one.startswith(f"{relative}: ") for one in outcome.done):
        return  # found before, in a dry run
    outcome.did(relative, source, len(raw))
    if outcome.is_dry:
        return
    try:
        path = clear_way(root, relative)
        make_folder(path.parent)
        write_file(path, raw, replace=True)
    except OSError as error:
        raise write_error(root / relative, error, len(raw)) from error


def _row_bytes(name: str) -> int:
    dtype, tail, _, _ = SYSTEM_ARRAYS[name]
    return int(np.prod(tail, dtype=np.int64)) * np.dtype(dtype).itemsize


def _sealed_files(root: Path) -> Iterator[dict[str, Any]]:
    """Yield the content of every record that is whole."""
    names = [ATOMS]
    with contextlib.suppress(CacheError):
        for teacher in list_logged_teachers(root):
            with contextlib.suppress(CacheError):
                names += list_logged_groups(root, teacher)
    for name in names:
        with contextlib.suppress(CacheError):
            folder = inside(root, f"{LOG}/{name}")
            for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
                document = _read_sealed(root, f"{LOG}/{name}/{path.name}", MAX_RECORD_BYTES)
                if document is not None and document.get("group") == name:
                    yield document


def _read_sealed(root: Path, relative: str, max_bytes: int) -> dict[str, Any] | None:
    try:
        path = inside(root, relative)
        return read_sealed(path, max_bytes=max_bytes, remedy="")[0] if path.is_file() else None
    except (CacheError, OSError):
        return None


def _plans_named(root: Path, plan: Plan) -> set[str]:
    """Return the sha256 of every plan that the sealed files of a store of this size name."""
    manifest = _read_sealed(root, MANIFEST, most_manifest_bytes(plan))
    documents = [*_sealed_files(root), *([manifest] if manifest is not None else [])]
    return {str(document.get("plan_sha256")) for document in documents}

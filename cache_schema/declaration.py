"""Metadata of groups: written once, compared ever after; a signal without values may be declared anew."""

from pathlib import Path
from typing import Any

from molkd.cache_schema import zarr_json
from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.files import (
    TMP_PREFIX,
    exclusive,
    inside,
    is_abandoned,
    make_folder,
    sweep,
    write_error,
    write_file,
)
from molkd.cache_schema.groups import (
    Group,
    committed_shards,
    declared_layout,
    load_signal,
    read_zarr_json,
)
from molkd.cache_schema.jsonfile import bounded
from molkd.cache_schema.layout import DATA, LOG
from molkd.cache_schema.plan import Plan, Systems
from molkd.cache_schema.signal import Signal, attributes, codebook_files


def put_group(root: Path, name: str, attributes: dict[str, Any]) -> None:
    """Write a group's zarr.json unless there is one.

    Raises
    ------
    CacheError
        If the attributes are too long, the disk is full or the folder cannot be written.
    """
    raw = zarr_json.dump(zarr_json.group_document(attributes))
    _put(root, f"{name}/zarr.json", bounded(raw, f"the attributes of {name}"))


def declare_signal(
    root: Path,
    plan: Plan,
    systems: Systems,
    group: str,
    signal: Signal,
    *,
    in_manifest: bool,
) -> None:
    """Write the metadata of a signal, or check that what is there says the same.

    Parameters
    ----------
    signal : with the codebook to store; one that is there already stays
    in_manifest : whether the manifest names the group: then its values are finished

    Raises
    ------
    CacheError
        If values of the signal are stored, or being written, with another shape or encoding.
    """
    parts = group.split("/")
    for k in range(3, len(parts)):
        put_group(root, "/".join(parts[:k]), {})
    log = inside(root, f"{LOG}/{group}")
    try:
        make_folder(log)
        with exclusive(log):
            if read_zarr_json(root, f"{group}/zarr.json") is not None:
                known = load_signal(root, plan, systems, group)
                if known.signal.same_as(signal.spec, signal.encoding):
                    return
                _require_unused(root, known, signal, in_manifest=in_manifest)
                _remove(root, known)
            files = {
                f"{layout.path}/zarr.json": zarr_json.dump(zarr_json.array_document(layout))
                for layout in declared_layout(group, signal, plan, systems).values()
            }
            if signal.codebook is not None:
                files |= codebook_files(group, signal.codebook)
            for name, raw in files.items():
                if not any(log.glob("*.json")):  # of a declaration that was stopped half-way
                    inside(root, f"{DATA}/{name}").unlink(missing_ok=True)
                _put(root, name, raw)
            put_group(root, group, attributes(signal))
            load_signal(root, plan, systems, group)
    except OSError as error:
        raise write_error(log, error, 0) from error


def _require_unused(root: Path, group: Group, asked: Signal, *, in_manifest: bool) -> None:
    """Refuse to declare a signal anew once a value of it is stored or under way."""
    n_committed = group.n_shards if in_manifest else len(committed_shards(root, group))
    temporaries = (root / DATA / group.name).rglob(f"{TMP_PREFIX}*")
    if n_committed:
        reason = f"{n_committed} of its {group.n_shards} shards are finished"
    elif not all(map(is_abandoned, temporaries)):
        reason = "another process is writing it"
    else:
        return
    raise CacheError(
        f"{root}: {group.name} is stored as {_words(group.signal)}, asked for {_words(asked)}, "
        f"and {reason}; ask for what is stored, or give the teacher another name (--name)"
    )


def _remove(root: Path, group: Group) -> None:
    """Remove a signal of which no shard is committed; the file that makes it a signal goes first."""
    arrays = group.layouts.values()
    unread = [x.file(shard) for x in arrays for shard in range(group.n_shards)]  # published by a dead writer
    for name in (f"{DATA}/{group.name}/zarr.json", *unread):
        inside(root, name).unlink(missing_ok=True)


def _put(root: Path, name: str, raw: bytes) -> None:
    """Write a file of data.zarr unless there is one; of two writers one wins, both compare afterwards."""
    path = inside(root, f"{DATA}/{name}")
    try:
        make_folder(path.parent)
        sweep(path.parent)
        if not path.exists():
            write_file(path, raw, replace=False)
    except OSError as error:
        raise write_error(path, error, len(raw)) from error


def _words(signal: Signal) -> str:
    spec, encoding = signal.spec, signal.encoding
    most = f", at most {spec.max_per_atom} an atom" if spec.axis == "edge" else ""
    return f"{encoding} {spec.dtype} {spec.axis} {spec.shape} in {spec.unit} ({spec.symmetry}{most})"

"""The manifest: all commits of a finished store in one sealed file, so that opening reads one file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molkd.cache_schema.checks import Checks
from molkd.cache_schema.commit import bad_systems, file_record, moments
from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.files import write_error, write_file
from molkd.cache_schema.groups import Group, check_metadata, load_atoms, load_signal, teacher_provenance
from molkd.cache_schema.jsonfile import read_sealed, seal
from molkd.cache_schema.layout import FORMAT, MANIFEST, MAX_MANIFEST_BYTES
from molkd.cache_schema.plan import Plan, Systems, check_format
from molkd.cache_schema.state import GroupState, read_log
from molkd.cache_schema.writer import Store

KIND = "molkd cache manifest"
_REMEDY = "delete manifest.json, the commit records hold the same; kd cache info and training go on without it"


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says; groups not taken apart yet."""

    path: Path
    groups: dict[str, Any]
    metadata: dict[str, dict[str, str]]  # group -> zarr.json -> sha256
    sha256: str

    def state(self, root: Path, plan: Plan, group: Group) -> GroupState:
        """Return the finished state of a group that the manifest names.

        Raises
        ------
        IntegrityError
            If the entry does not describe the group.
        """
        check_metadata(root, group, self.metadata[group.name])
        check = Checks(f"{self.path}, {group.name}")
        entry = check.table(self.groups, group.name)
        arrays = check.table(entry, "arrays")
        if set(arrays) != set(group.layouts):
            check.problem("arrays", f"expected exactly {', '.join(group.layouts)}")
        check.finish(_REMEDY)
        state = GroupState(group, bad_systems=set(bad_systems(check, entry, plan)))
        state.files = {shard: {} for shard in range(plan.n_shards)}
        for name, layout in group.layouts.items():
            table = check.table(arrays, name, "arrays.")
            if layout.dtype.kind == "f":
                state.moments[name] = moments(check, table, name, layout)
            shards = check.items(table, "shards", f"arrays.{name}.")
            if len(shards) != plan.n_shards:
                check.problem(f"arrays.{name}.shards", f"{len(shards)} entries, expected {plan.n_shards}")
                continue
            for shard, one in enumerate(shards):
                state.files[shard][name] = file_record(check, {name: one}, name, layout, int(group.rows[shard]))
        check.finish(_REMEDY)
        return state


def read_manifest(root: Path, plan: Plan) -> Manifest | None:
    """Read manifest.json; None if the store is not finished.

    Raises
    ------
    CacheError
        If it has a newer format.
    IntegrityError
        If it is damaged or belongs to another plan.
    """
    path = root / MANIFEST
    if not path.is_file():
        return None
    document, digest = read_sealed(path, max_bytes=MAX_MANIFEST_BYTES, remedy=_REMEDY)
    check_format(document, KIND, path)
    check = Checks(str(path))
    if document.get("plan_sha256") != plan.sha256:
        check.problem("plan_sha256", "belongs to another plan")
    groups = check.table(document, "groups")
    metadata = {n: check.hex_table(check.table(groups, n), "metadata", 64, f"{n}.") for n in groups}
    check.finish(_REMEDY)
    return Manifest(path, groups, metadata, digest)


def load_states(root: Path, plan: Plan, systems: Systems, names: list[str]) -> dict[str, GroupState]:
    """Return the state of every named group: from the manifest if it has the group, else from the log.

    Raises
    ------
    CacheError
        If an encoding is unknown.
    IntegrityError
        If manifest, records or metadata are damaged.
    """
    manifest = read_manifest(root, plan)
    states = {}
    for name in names:
        group = load_atoms(plan, systems) if name == "atoms" else load_signal(root, plan, systems, name)
        if manifest is not None and name in manifest.groups:
            states[name] = manifest.state(root, plan, group)
        else:
            states[name] = read_log(root, plan, group)
    return states


def finalize(store: Store) -> Path:
    """Fold all commits into manifest.json; running it again, or after new signals, replaces the file.

    Returns
    -------
    Path
        Of the manifest.

    Raises
    ------
    CacheError
        If a group is not complete, naming its missing shards.
    """
    root, plan = store.path, store.plan
    groups: dict[str, Any] = {}
    for name in store.groups:
        group = load_atoms(plan, store.systems) if name == "atoms" else load_signal(root, plan, store.systems, name)
        state = read_log(root, plan, group)
        require_complete(root, state)
        groups[name] = _group_entry(state)
    document = {
        "kind": KIND,
        "format": FORMAT,
        "plan_sha256": plan.sha256,
        "fingerprint": plan.fingerprint,
        "teachers": {name: teacher_provenance(root, name) for name in store.teachers},
        "groups": groups,
    }
    raw = seal(document)
    path = root / MANIFEST
    try:
        if not path.is_file() or path.read_bytes() != raw:
            write_file(path, raw, replace=True)
    except OSError as error:
        raise write_error(path, error, len(raw)) from error
    return path


def require_complete(root: Path, state: GroupState) -> None:
    """Refuse a group with missing shards.

    Raises
    ------
    CacheError
        Saying how many are missing.
    """
    missing = state.missing_shards
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise CacheError(
            f"{root}: {state.group.name} is not finished, {len(missing)} of {len(state.group.rows)} shards are missing "
            f"({shown}); run the command that wrote it again, finished shards are kept"
        )


def _group_entry(state: GroupState) -> dict[str, Any]:
    arrays = {}
    for name in state.group.layouts:
        entry: dict[str, Any] = {"shards": [state.files[k][name].to_json() for k in sorted(state.files)]}
        if name in state.moments:
            entry["sums"] = state.moments[name].to_json()
        arrays[name] = entry
    return {
        "arrays": arrays,
        "bad_systems": sorted(state.bad_systems),
        "weights_sha256": state.group.weights_sha256,
        "metadata": state.group.metadata,
    }

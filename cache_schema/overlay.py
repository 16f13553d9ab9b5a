"""Overlays: a store of one's own signals that reads everything else from a shared one, and only reads it."""

from pathlib import Path

from molkd.cache_schema.creation import new_folder
from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.files import inside, make_folder, write_error, write_file
from molkd.cache_schema.groups import ATOMS, list_logged_teachers, list_signal_groups, list_teachers
from molkd.cache_schema.jsonfile import read_sealed, seal
from molkd.cache_schema.layout import DATA, FORMAT, LOG, MAX_JSON_BYTES, PLAN
from molkd.cache_schema.plan import (
    SYSTEM_ARRAYS,
    Plan,
    check_format,
    read_metadata,
    read_plan,
    read_system_array,
    read_systems,
    system_file,
)
from molkd.cache_schema.remote import is_url, local_root, writable_root
from molkd.cache_schema.state import load_states, require_complete

OVERLAY = "overlay.json"
KIND = "molkd cache overlay"
_MAX_PLACE = 2000  # characters of a path or URL


def create_overlay(shared: str | Path, path: Path) -> Path:
    """Make a store for signals of one's own over a shared one, or point one that exists to its new place.

    It has the plan and the systems table of the shared store; structures, labels and the signals there are
    read from that store, whose files are never written to.

    Parameters
    ----------
    shared : a folder or a URL
    path : the new folder, NAME.kdcache

    Returns
    -------
    Path
        Of the overlay.

    Raises
    ------
    CacheError
        If the shared store is unfinished or an overlay itself, or the folder is something else.
    """
    root, place = writable_root(path), local_root(shared)
    plan = read_plan(place)
    systems = read_systems(place, plan)
    if (place / OVERLAY).exists():
        raise CacheError(
            f"{place}: is an overlay itself; make one over the store it refers to ({_read(place)}), or make "
            f"it self-contained first: kd cache copy {place} NAME.kdcache"
        )
    require_complete(place, load_states(place, plan, systems, [ATOMS])[ATOMS])
    text = str(shared) if is_url(shared) else str(Path(shared).absolute())
    raw = seal(
        {
            "kind": KIND,
            "format": FORMAT,
            "plan_sha256": plan.sha256,
            "fingerprint": plan.fingerprint,
            "store": text,
        }
    )
    try:
        if (root / PLAN).exists():
            _require_overlay_of(root, plan)
            write_file(root / OVERLAY, raw, replace=True)
            return root
        with new_folder(root) as folder:
            _copy_table(place, plan, folder)
            write_file(folder / OVERLAY, raw, replace=True)
    except OSError as error:
        raise write_error(root, error, len(raw)) from error
    return root


def base_of(root: Path, plan: Plan) -> Path | None:
    """Return the folder of the shared store that an overlay refers to; None for any other store.

    Raises
    ------
    CacheError
        If the shared store is gone or holds other systems now.
    IntegrityError
        If overlay.json is damaged.
    """
    if not (root / OVERLAY).is_file():
        return None
    text = _read(root)
    remedy = f"say where the store is now: kd cache overlay PLACE {root}"
    try:
        base = local_root(text)
        found = read_plan(base)
    except (CacheError, OSError, ValueError) as error:
        raise CacheError(
            f"{root}: an overlay of {text} (fingerprint {plan.fingerprint}), which cannot be read ({error}); "
            f"mount or restore it, or {remedy}"
        ) from error
    if found.sha256 != plan.sha256:
        raise CacheError(
            f"{root}: an overlay of {text}, which is another store now: its fingerprint is "
            f"{found.fingerprint} (plan {found.sha256[:16]}), expected {plan.fingerprint} "
            f"(plan {plan.sha256[:16]}); {remedy}"
        )
    if (base / OVERLAY).exists():
        raise CacheError(f"{root}: an overlay of {text}, which is an overlay itself; {remedy}")
    return base


def distant_base(root: Path) -> str:
    """Return the URL of the shared store that an overlay refers to; empty if that is a folder, or none.

    Raises
    ------
    IntegrityError
        If overlay.json is damaged.
    """
    text = _read(root) if (root / OVERLAY).is_file() else ""
    return text if is_url(text) else ""


def locate_groups(root: Path, plan: Plan) -> dict[str, Path]:
    """Return every group with the folder of the store that holds it; what an overlay holds itself wins.

    Raises
    ------
    CacheError, IntegrityError
        As `base_of`, or if a group's metadata are damaged.
    """
    base = base_of(root, plan)
    places: dict[str, Path] = {}
    for place in (root,) if base is None else (base, root):
        for teacher in sorted({*list_teachers(place), *list_logged_teachers(place)}):
            places |= dict.fromkeys(list_signal_groups(place, teacher), place)
    return {ATOMS: base or root} | {name: places[name] for name in sorted(places)}


def _read(root: Path) -> str:
    """Return the place that an overlay refers to."""
    remedy = "point to the shared store again with kd cache overlay"
    document, _ = read_sealed(inside(root, OVERLAY), max_bytes=MAX_JSON_BYTES, remedy=remedy)
    check_format(document, KIND, root / OVERLAY)
    text = document.get("store")
    if not isinstance(text, str) or not 0 < len(text) <= _MAX_PLACE:
        raise IntegrityError(f"{root / OVERLAY}: names no store; {remedy}")
    return text


def _require_overlay_of(root: Path, plan: Plan) -> None:
    known = read_plan(root)
    if not (root / OVERLAY).exists():
        raise CacheError(f"{root}: is a store of its own; choose another name for the overlay")
    if known.sha256 != plan.sha256:
        raise CacheError(
            f"{root}: is an overlay of other systems (fingerprint {known.fingerprint}, not "
            f"{plan.fingerprint}); choose another name"
        )


def _copy_table(place: Path, plan: Plan, folder: Path) -> None:
    """Write what the plan vouches for, and the plan itself, into an empty folder."""
    for name in SYSTEM_ARRAYS:
        array = read_system_array(place, plan, name)
        _write(folder, system_file(name), array.astype(array.dtype.newbyteorder("<")).tobytes())
    for name in plan.metadata:
        _write(folder, f"{DATA}/{name}", read_metadata(place, plan, name))
    make_folder(folder / LOG)
    _write(folder, PLAN, inside(place, PLAN).read_bytes())


def _write(folder: Path, relative: str, raw: bytes) -> None:
    path = inside(folder, relative)  # a plan may name anything
    make_folder(path.parent)
    write_file(path, raw, replace=True)

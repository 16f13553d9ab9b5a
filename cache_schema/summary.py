"""`kd cache info` and `kd cache verify` for people: the same content as their JSON, as text."""

from collections.abc import Iterator, Mapping
from typing import Any

from molkd.cache_schema.findings import Report

_ROW = "{:<26} {:<8} {:>9}  {:<6} {:<6} {:>12} {:>12}  {}"
_HEAD = ("array", "axis", "shape", "unit", "stored", "bytes/atom", "rms", "")
_TEACHER_FACTS = (
    "architecture", "weights_sha256", "precision", "licence", "citation", "energy_reference", "neighbor_rule",
    "code",
)  # fmt: skip


def describe_info(info: Mapping[str, Any]) -> str:
    """Return the content of `manifest.info` as a few lines and one table."""
    state = "finished" if info["finished"] else "UNFINISHED: the command that wrote it continues"
    counts = f"{info['systems']:,} systems, {info['atoms']:,} atoms, {info['shards']:,} shards"
    lines = [
        f"{info['path']}  (format {info['format']}, {state})",
        f"{counts}; {info['systems_with_energy']:,} systems have an energy label",
        f"{info['bytes']:,} bytes, {info['bytes_per_atom']:,.0f} an atom",
        f"dataset fingerprint {info['fingerprint']}",
        f"sources: {', '.join(info['sources'])}",
    ]
    if info["overlay_of"]:
        lines.append(f"an overlay: structures, labels and other signals lie in {info['overlay_of']}")
    lines += [f"{key}: {info['dataset'][key]}" for key in ("licence", "citation") if info["dataset"].get(key)]
    if made := describe_augmentation(info["dataset"]):
        lines.append(made)
    lines += ["", _ROW.format(*_HEAD).rstrip()]
    lines += _rows("", info["fields"])
    for name, teacher in info["teachers"].items():
        lines += _rows(f"{name}/", teacher["signals"])
    for name, teacher in info["teachers"].items():
        facts = teacher["provenance"]
        lines += ["", f"teacher {name}"]
        lines += [f"  {key}: {facts[key]}" for key in _TEACHER_FACTS if facts.get(key)]
        if teacher.get("bad_systems"):
            lines.append(f"  quarantined systems: {teacher['bad_systems']}")
    return "\n".join(lines)


def describe_report(report: Report) -> str:
    """Return what `verify` found, one problem a line."""
    how = "presence and sizes" if report.quick else "every checksum"
    checked = f"{report.n_files:,} files, {report.n_bytes:,} bytes, {how}"
    verdict = f"{len(report.problems)} problems in {checked}" if report.problems else f"ok: {checked}"
    notes = [f"  note, harmless: {note}" for note in report.notes]
    return "\n".join([verdict, *(f"  {problem}" for problem in report.problems), *notes])


def _rows(prefix: str, entries: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, entry in entries.items():
        shape = "x".join(str(n) for n in entry["shape"]) or "-"
        rms = f"{entry['rms']:.4g}" if entry.get("rms") is not None else ""
        notes = [f"{entry['rows']:,} edges"] if entry["axis"] == "edge" else []
        notes += [] if entry["complete"] else [f"{entry['missing_shards']} shards missing"]
        yield _ROW.format(
            prefix + name, entry["axis"], shape, entry["unit"], entry["encoding"],
            f"{entry['bytes_per_atom']:.1f}", rms, ", ".join(notes),
        ).rstrip()  # fmt: skip


def describe_augmentation(dataset: Mapping[str, Any]) -> str:
    """Say how the structures of a store were made, if `kd augment` made them; else nothing."""
    facts = dataset.get("augmentation")
    recipe = facts.get("recipe") if isinstance(facts, dict) else None
    if not isinstance(facts, dict) or not isinstance(recipe, dict):
        return ""
    return (
        f"made by kd augment {recipe.get('method')}, seed {recipe.get('seed')}: "
        f"{facts.get('n_kept')} of {facts.get('n_made')} structures kept"
    )

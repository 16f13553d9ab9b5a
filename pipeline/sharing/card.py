"""`kd cache card`: a store in Markdown, what a colleague must know before using it."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from molkd.cache_schema.manifest import info
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.summary import describe_augmentation
from molkd.pipeline.errors import DataError
from molkd.pipeline.evaluation.tables import Column, markdown_table
from molkd.pipeline.files import write_atomic

_SYSTEMS_PER_READ = 10_000
_MAX_SOURCES = 20
_UNKNOWN = "not stated; ask who made the store before you publish anything"
_TEACHER_FACTS = (
    "architecture", "weights_sha256", "precision", "energy_reference", "neighbor_rule", "code", "licence",
    "citation",
)  # fmt: skip
_COLUMNS = (
    Column("signal", "signal"),
    Column("axis", "axis"),
    Column("shape", "shape"),
    Column("unit", "unit"),
    Column("encoding", "encoding"),
    Column("bytes_per_atom", "bytes an atom", decimals=1),
    Column("rms", "rms"),
    Column("error_rms", "rms error"),
    Column("held_out_error_rms", "held out"),
    Column("error_max_abs", "largest error"),
    Column("loss_floor", "loss floor"),
)
_ABOUT_ERRORS = (
    "Errors are those of stored against given values, in the signal's unit; *held out* is the rms error on "
    "systems that the encoding was not fitted to; *loss floor* is the mean squared error: what an MSE loss "
    "against the stored values leaves unseen."
)
# Losses of kd train-student, and the signals each of them reads.
_LOSSES = {
    "n2n": {"node"},
    "e2n": {"e2n"},
    "v2v": {"v2v"},
    "e2e": {"edge"},
    "vanilla1": {"energy", "forces"},
    "vanilla2": {"atomic_energies"},
}


def describe_store(store: str | Path) -> dict[str, Any]:
    """Return what `kd cache info` says of a store, its elements, sizes, and the history of its encodings.

    Raises
    ------
    CacheError, IntegrityError
        As `Cache.open`.
    """
    facts = info(store)
    with Cache.open(store) as cache:
        counts = np.zeros(len(chemical_symbols), dtype=np.int64)
        for begin in range(0, cache.n_systems, _SYSTEMS_PER_READ):
            part = np.arange(begin, min(begin + _SYSTEMS_PER_READ, cache.n_systems))
            numbers = cache.read(part, ("atomic_numbers",))["atomic_numbers"]
            counts += np.bincount(numbers, minlength=len(counts))
        size = cache.system_n_atoms
        facts |= {
            "elements": {chemical_symbols[z]: int(counts[z]) for z in np.flatnonzero(counts)},
            "atoms_per_system": {
                "smallest": int(size.min()), "median": float(np.median(size)), "largest": int(size.max())
            },
            "periodic_systems": int(cache.pbc.any(axis=1).sum()),
        }  # fmt: skip
        for teacher, entry in facts["teachers"].items():
            for signal, one in entry["signals"].items():
                one["recoded_from"] = list(cache.signal(teacher, signal).recoded_from)
    return facts


def store_card(facts: Mapping[str, Any]) -> str:
    """Return the Markdown of what `describe_store` found; nothing in it can steer a terminal."""
    lines = "\n".join(_lines(facts)).split("\n")
    return "\n".join("".join(c if c.isprintable() else " " for c in line) for line in lines)


def write_card(facts: Mapping[str, Any], out: Path) -> None:
    """Write the Markdown to a new file.

    Raises
    ------
    DataError
        If there is a file already, or it cannot be written.
    """
    if out.exists():
        raise DataError(f"{out}: exists; remove it, or choose another name")
    write_atomic(out, store_card(facts) + "\n")


def _lines(facts: Mapping[str, Any]) -> Iterator[str]:
    dataset, name = facts["dataset"], Path(facts["path"]).name
    size, symbols = facts["atoms_per_system"], ", ".join(f"{e} ({n:,})" for e, n in facts["elements"].items())
    yield f"# {name}"
    yield ""
    if not facts["finished"]:
        yield "**Unfinished**: the command that writes it has to be run again.\n"
    yield f"- dataset fingerprint: `{facts['fingerprint']}`"
    yield f"- size: {facts['bytes']:,} bytes, {facts['bytes_per_atom']:,.0f} an atom"
    yield f"- licence of the data: {dataset.get('licence') or _UNKNOWN}"
    yield f"- citation of the data: {dataset.get('citation') or _UNKNOWN}"
    yield ""
    yield "## Systems"
    yield ""
    periodic = facts["periodic_systems"]
    yield f"- {facts['systems']:,} systems with {facts['atoms']:,} atoms; {periodic:,} periodic"
    yield f"- atoms a system: {size['smallest']:,} to {size['largest']:,}, median {size['median']:,.0f}"
    yield f"- elements (atoms): {symbols}"
    yield f"- energy labels: {facts['systems_with_energy']:,} systems"
    if type(dataset.get("n_with_forces")) is int:
        yield f"- force labels: {dataset['n_with_forces']:,} systems"
    sources = facts["sources"]
    more = f" and {len(sources) - _MAX_SOURCES:,} more" if len(sources) > _MAX_SOURCES else ""
    yield f"- sources: {', '.join(sources[:_MAX_SOURCES])}{more}"
    if made := describe_augmentation(dataset):
        yield f"- {made}"
    for key, words in (
        ("chosen_from", "chosen from the dataset"),
        ("merged_from", "merged from the datasets"),
    ):
        if dataset.get(key):
            values = dataset[key] if isinstance(dataset[key], list) else [dataset[key]]
            yield f"- {words} {', '.join(f'`{value}`' for value in values)}"
    for teacher, entry in facts["teachers"].items():
        yield from _teacher(teacher, entry)
    yield from _usage(facts)


def _teacher(name: str, entry: Mapping[str, Any]) -> Iterator[str]:
    provenance, signals = entry["provenance"], entry["signals"]
    yield ""
    yield f"## Teacher {name}"
    yield ""
    yield from (f"- {key}: {provenance[key]}" for key in _TEACHER_FACTS if provenance.get(key))
    if entry["bad_systems"]:
        yield f"- systems without usable output: {len(entry['bad_systems']):,}"
    yield ""
    rows = [
        {**one, "signal": signal, "shape": "x".join(map(str, one["shape"])) or "-"}
        for signal, one in signals.items()
    ]
    yield markdown_table(rows, _COLUMNS)
    yield ""
    yield _ABOUT_ERRORS
    for signal, one in signals.items():
        if one["recoded_from"]:
            steps = [
                f"{step.get('encoding')}" + (f" (rms error {error:.3g})" if type(error) is float else "")
                for step in one["recoded_from"]
                for error in [step.get("error_rms")]
            ]
            yield f"\n`{signal}` was stored as {', then '.join(steps)} before; its errors are against that."
        if not one["complete"]:
            yield f"\n`{signal}` is unfinished: {one['missing_shards']} shards are missing."


def _usage(facts: Mapping[str, Any]) -> Iterator[str]:
    path = shlex.quote(facts["path"])
    yield ""
    yield "## How to use it"
    yield ""
    yield "```bash"
    yield f"kd cache verify {path}"
    for teacher, entry in facts["teachers"].items():
        there = {signal for signal, one in entry["signals"].items() if one["complete"]}
        losses = [loss for loss, needed in _LOSSES.items() if needed <= there]
        if losses:
            terms = " ".join(f"--kd {loss}=auto" for loss in losses[:2])
            which = f" --teacher {teacher}" if len(facts["teachers"]) > 1 else ""
            yield f"kd train-student {path} --student painn-small {terms}{which} --out runs/student"
    if not facts["teachers"]:
        yield f"kd train-student {path} --student painn-small --kd none --out runs/plain"
    yield "```"
    yield ""
    yield "Arrays are plain Zarr v3 under `data.zarr`; docs/cache-format.md is the specification."

"""`kd cache export`: a store for people without this package, as npz, extxyz or a compressed Zarr archive."""

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from zarr.abc.codec import BytesBytesCodec

from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.files import (
    exclusive,
    fsync_folder,
    make_folder,
    open_temporary,
    sweep,
    temporary_path,
    write_error,
)
from molkd.cache_schema.groups import ATOMS
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.regroup import Origins
from molkd.cache_schema.state import require_complete
from molkd.pipeline.progress import Progress
from molkd.pipeline.sharing.archive import pack, parse_compressor, write_folder
from molkd.pipeline.sharing.choice import Choice
from molkd.pipeline.sharing.copying import wanted_signals
from molkd.pipeline.sharing.frames import fits_extxyz, write_extxyz
from molkd.pipeline.sharing.npz import write_npz
from molkd.pipeline.sharing.selection import Selection

log = logging.getLogger(__name__)

ARCHIVES = ("zarr", "zip", "tar")
FORMATS = ("npz", "extxyz", *ARCHIVES)
_COMPRESSOR = "blosc:zstd:5"
_SUFFIXES = {f".{name}": name for name in FORMATS} | {".xyz": "extxyz"}


@dataclass(frozen=True)
class ExportSummary:
    """What was written."""

    file: str
    format: str
    n_systems: int
    n_atoms: int
    signals: list[str]
    bytes: int
    seconds: float


def export_store(
    source: str | Path,
    out: Path,
    *,
    form: str | None = None,
    teacher: str | None = None,
    signals: Sequence[str] = (),
    selection: Selection | None = None,
    compressor: str | None = None,
) -> ExportSummary:
    """Write a store, or a part of it, in a format that others read; `out` appears whole or not at all.

    Parameters
    ----------
    form : one of `FORMATS`; None goes by the suffix of `out`
    teacher, signals, selection : as `copying.copy_store`
    compressor : of an archive: blosc[:CNAME[:LEVEL]], zstd[:LEVEL], gzip[:LEVEL] or none; None takes
        blosc:zstd:5

    Raises
    ------
    CacheError
        If `out` exists, no format is named, a compressor is but for no archive, the store lacks something, or
        the disk is full.
    IntegrityError
        If the store is damaged.
    """
    began = time.perf_counter()
    form = form or _SUFFIXES.get(out.suffix.lower())
    if form not in FORMATS:
        raise CacheError(
            f"{out}: name a format with --format ({', '.join(FORMATS)}), or a file of that suffix"
        )
    if compressor is not None and form not in ARCHIVES:
        raise CacheError(
            f"{out}: {form} takes no --compressor; leave it out, or choose an archive with --format "
            f"({', '.join(ARCHIVES)})"
        )
    if out.exists():
        raise CacheError(f"{out}: exists; remove it, or choose another name")
    with Cache.open(source) as cache:
        groups = wanted_signals(cache, teacher, signals)
        if form == "extxyz":
            features = [g for g in groups if not fits_extxyz(cache.state(g).group.signal.spec)]
            groups = [g for g in groups if g not in features]
            if features:
                log.info(
                    "%s: without features (%s); take npz or an archive for them", out, ", ".join(features)
                )
        for group in (ATOMS, *groups):
            require_complete(cache.state(group).root, cache.state(group))
        systems = (selection or Selection()).apply(cache)
        choice = Choice(cache, Origins((cache,), np.zeros_like(systems), systems), tuple(groups))
        n_passes = 1 if form == "extxyz" else 1 + len(groups)
        with Progress(n_passes * len(systems), "export", "system") as progress:
            _write(out, form, choice, compressor or _COMPRESSOR, progress.update)
        n_atoms = int(choice.n_atoms.sum())
    n_bytes = (
        sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) if out.is_dir() else out.stat().st_size
    )
    return ExportSummary(
        file=str(out),
        format=form,
        n_systems=len(systems),
        n_atoms=n_atoms,
        signals=["/".join(g.split("/")[1:]) for g in groups],
        bytes=n_bytes,
        seconds=time.perf_counter() - began,
    )


def _write(
    out: Path, form: str, choice: Choice, compressor: str, on_systems: Callable[[int], object]
) -> None:
    codecs = parse_compressor(compressor)
    try:
        make_folder(out.absolute().parent)
        sweep(out.absolute().parent)
        if form == "npz":
            with whole_file(out) as file:
                write_npz(file, choice, on_systems)
        elif form == "extxyz":
            with whole_file(out) as file:
                write_extxyz(file, choice, on_systems)
        else:
            _write_archive(out, form, choice, codecs, on_systems)
    except OSError as error:
        raise write_error(out, error, 0) from error


def _write_archive(
    out: Path,
    form: str,
    choice: Choice,
    codecs: tuple[BytesBytesCodec, ...],
    on_systems: Callable[[int], object],
) -> None:
    folder = temporary_path(out.absolute())
    folder.mkdir()
    try:
        with exclusive(folder):  # alive, whatever its age
            write_folder(folder, choice, codecs, on_systems)
            if form == "zarr":
                folder.rename(out)
                fsync_folder(out.absolute().parent)
                return
            with whole_file(out) as file:
                pack(folder, file, form)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[BinaryIO]:
    """Give a file to write to; it gets its name when it is complete, and is durable then."""
    temporary, fd = open_temporary(target.absolute())
    try:
        with os.fdopen(fd, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        temporary.rename(target)
        fsync_folder(target.absolute().parent)
    finally:
        temporary.unlink(missing_ok=True)

"""What can be wrong inside a shard's files: damaged chunks, a wrong index, other edges or atoms."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.array_file import index_pieces
from molkd.cache_schema.commit import FileRecord
from molkd.cache_schema.crc import crc32c, crc32c_joined, crc_hex
from molkd.cache_schema.edges import are_inside
from molkd.cache_schema.fields import EDGE_INDEX, N_EDGES
from molkd.cache_schema.identity import system_id
from molkd.cache_schema.layout import ArrayLayout
from molkd.cache_schema.plan import Systems
from molkd.cache_schema.untrusted import is_hollow, open_regular

_PIECE_BYTES = 1 << 22  # in memory at a time

Layouts = dict[str, ArrayLayout]


def damages_of_file(
    path: Path, layout: ArrayLayout, shard: int, record: FileRecord
) -> Iterator[tuple[int | None, str]]:
    """Yield every chunk that is not as recorded with a message; None stands for the index."""
    total, n_found = 0, 0
    with os.fdopen(open_regular(path), "rb") as handle:
        if is_hollow(handle.fileno()):
            yield None, f"shard {shard} of {layout.path} is hollow: it has a size, but was never written"
            return
        for chunk in range(record.n_chunks):
            crc = 0
            for begin in range(0, layout.chunk_bytes, _PIECE_BYTES):
                data = handle.read(min(_PIECE_BYTES, layout.chunk_bytes - begin))
                crc = crc32c(data, crc)
            total = crc32c_joined(total, crc, layout.chunk_bytes)
            if crc_hex(crc) != record.chunk_crc32c(chunk):
                n_found += 1
                yield chunk, f"chunk {chunk} of shard {shard} of {layout.path} is damaged (crc32c differs)"
        is_ours, total = _check_index(handle, layout, record.rows, total)
    if n_found:
        return
    if crc_hex(total) != record.crc32c:
        yield None, f"the index of shard {shard} of {layout.path} is damaged (crc32c of the file differs)"
    elif not is_ours:
        yield None, f"the index of shard {shard} of {layout.path} does not name its chunks in order"


def _check_index(handle: BinaryIO, layout: ArrayLayout, n_rows: int, total: int) -> tuple[bool, int]:
    """Compare the rest of a file with the index it must be; return whether it is, and the file's crc32c."""
    is_ours = True
    for piece in index_pieces(layout, n_rows):
        data = handle.read(len(piece))
        is_ours &= data == piece
        total = crc32c(data, total)
    return is_ours, total


def wrong_edges(root: Path, layouts: Layouts, systems: Systems, shard: int, n_rows: int) -> str:
    """Say what is wrong with the edges of a shard whose files have the right checksums; "" if nothing is."""
    mine = systems.in_shard(shard)
    n_edges = _rows(root, layouts[N_EDGES.name], shard, len(mine))
    index = _rows(root, layouts[EDGE_INDEX.name], shard, n_rows)
    if (n_edges < 0).any() or n_edges.sum() != n_rows:
        return f"n_edges of shard {shard} adds up to {n_edges.sum()}, the record has {n_rows} edges"
    if not are_inside(index, np.repeat(systems.n_atoms[mine.start : mine.stop], n_edges)):
        return f"edges of shard {shard} end at atoms that their system does not have"
    return ""


def wrong_identity(root: Path, layouts: Layouts, systems: Systems, shard: int) -> str:
    """Say which systems of a shard do not have the atoms that their ids are the hash of; "" if all do."""
    mine = systems.in_shard(shard)
    n_rows = systems.rows_in_shard(shard)
    rows = {name: _rows(root, layouts[name], shard, n_rows) for name in ("atomic_numbers", "positions")}
    begin = 0
    wrong = []
    for i in mine:
        end = begin + int(systems.n_atoms[i])
        numbers, positions = rows["atomic_numbers"][begin:end], rows["positions"][begin:end]
        if system_id(numbers, positions, systems.cell[i], systems.pbc[i]) != systems.id[i].tobytes():
            wrong.append(i)
        begin = end
    if not wrong:
        return ""
    return f"{len(wrong)} systems of shard {shard} (first: {wrong[0]}) have ids their atoms do not give"


def _rows(root: Path, layout: ArrayLayout, shard: int, n_rows: int) -> NDArray[Any]:
    n_values = n_rows * layout.row_bytes // layout.dtype.itemsize
    raw = np.fromfile(root / layout.file(shard), layout.dtype.newbyteorder("<"), n_values)
    return raw.reshape(n_rows, *layout.spec.shape)

"""What each file of a finished store must be, as plan, manifest and metadata say; for stores read by URL."""

from pathlib import Path

import numpy as np

from molkd.cache_schema.checks import Checks
from molkd.cache_schema.codebook import MAX_PCA_CHANNELS
from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.groups import ATOMS
from molkd.cache_schema.layout import DATA, split_signal_group
from molkd.cache_schema.objects import Expected
from molkd.cache_schema.plan import SYSTEM_ARRAYS, Plan, system_file
from molkd.cache_schema.server import check_relative
from molkd.cache_schema.state import Manifest
from molkd.cache_schema.zarr_json import parse, read_signal

PUBLISH = "ask its owner to publish it again (kd cache copy)"
_MAX_FILES = 20_000  # of metadata
_MAX_ZARR_JSON_BYTES = 1 << 24


class ExpectedFiles:
    """Looks up files by their path in the store.

    Attributes
    ----------
    small : metadata and the systems table, all that opening the store needs
    """

    def __init__(self, where: str, root: Path, plan: Plan, manifest: Manifest) -> None:
        self._where, self._root, self._manifest = where, root, manifest
        metadata = dict(plan.metadata)
        for group, names in manifest.metadata.items():
            _check_group(group, where)
            metadata |= {name: digest for name, digest in names.items() if name not in plan.metadata}
        if len(metadata) > _MAX_FILES:
            raise IntegrityError(
                f"{where}: names {len(metadata)} files of metadata, at most {_MAX_FILES} expected"
            )
        self.small = {
            f"{DATA}/{check_relative(name, where)}": Expected(_MAX_ZARR_JSON_BYTES, sha256=digest)
            for name, digest in metadata.items()
        }
        for name, digest in plan.systems.items():
            n_bytes = plan.packing.n_systems * _row_bytes(name)
            self.small[system_file(name)] = Expected(n_bytes, n_bytes, sha256=digest)

    def of(self, relative: str) -> Expected | None:
        """Return what a file must be; None if the store has no such file.

        Raises
        ------
        IntegrityError
            If the manifest makes no sense.
        """
        known = self.small.get(relative)
        if known is not None or not relative.startswith(f"{DATA}/") or "/c/" not in relative:
            return known
        array, _, chunk = relative.removeprefix(f"{DATA}/").partition("/c/")
        number = chunk.split("/")[0]
        group, _, name = array.rpartition("/")
        check_relative(relative, str(self._root))
        if group not in self._manifest.groups or not number.isdecimal():
            return None
        check = Checks(f"{self._where}, {group}")
        arrays = check.table(check.table(self._manifest.groups, group), "arrays")
        if name not in arrays:
            return self._codebook(group, name, array)
        shards = check.items(check.table(arrays, name), "shards")
        if len(number) > 10 or int(number) >= len(shards) or not isinstance(shards[int(number)], dict):
            return None
        shard = shards[int(number)]
        n_bytes = check.integer(shard, "bytes", 0, 1 << 62)
        expected = Expected(n_bytes, n_bytes, check.hexadecimal(shard, "crc32c", 8))
        check.finish(PUBLISH)
        return expected

    def _codebook(self, group: str, name: str, array: str) -> Expected | None:
        """Return what the file of a codebook's array is; the signal's group says so."""
        if not {f"{DATA}/{array}/zarr.json", f"{DATA}/{group}/zarr.json"} <= set(self.small):
            return None
        path = self._root / DATA / group / "zarr.json"
        entry = read_signal(parse(path.read_bytes(), str(path)), str(path))[2]
        check = Checks(str(path))
        table = check.table(check.table(check.table(entry, "codebook"), "arrays"), name)
        digest = check.hexadecimal(table, "sha256", 64)
        check.finish(PUBLISH)
        return Expected(4 * MAX_PCA_CHANNELS**2, sha256=digest)

    @property
    def n_bytes(self) -> int:
        """Bytes of all shard files, as the manifest says; what makes no sense counts nothing."""
        check, total = Checks(""), 0
        for name in self._manifest.groups:
            arrays = check.table(check.table(self._manifest.groups, name), "arrays")
            for array in arrays:
                shards = check.items(check.table(arrays, array), "shards")
                total += sum(check.integer(s, "bytes", 0, 1 << 62) for s in shards if isinstance(s, dict))
        return total


def _check_group(group: str, where: str) -> None:
    check_relative(group, where)
    try:
        if group != ATOMS:
            split_signal_group(group)
    except (CacheError, ValueError) as error:
        raise IntegrityError(f"{where}: names the group {group!r}, which no store can have") from error


def _row_bytes(name: str) -> int:
    dtype, tail, _, _ = SYSTEM_ARRAYS[name]
    return int(np.prod(tail, dtype=np.int64)) * np.dtype(dtype).itemsize

"""Writing files so that a crash leaves the old one or the new one, never half of one."""

from pathlib import Path

from molkd.cache_schema.files import make_folder, write_file
from molkd.pipeline.errors import DataError


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace `path` durably and whole; umask applies, parents are made.

    Raises
    ------
    DataError
        If it cannot be written.
    """
    try:
        make_folder(path.parent)
        write_file(path, content.encode() if isinstance(content, str) else content, replace=True)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"{path}: cannot be written ({reason}); check the path, its rights and the free space"
        ) from error

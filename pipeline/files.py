"""Writing files so that a crash leaves the old one or the new one, never half of one."""

from pathlib import Path

from molkd.cache_schema.files import make_folder, write_file


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace `path` durably and whole; umask applies, parents are made."""
    make_folder(path.parent)
    write_file(path, content.encode() if isinstance(content, str) else content, replace=True)

"""Writing files so that a crash leaves the old one or the new one, never half of one."""

import os
import uuid
from pathlib import Path


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` beside `path`, force it to disk and rename; umask applies, parents are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
    data = content.encode() if isinstance(content, str) else content
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

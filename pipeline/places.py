"""Where data are: a file or folder, or the URL of a store on a server, which a path would not keep whole."""

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from molkd.cache_schema.remote import is_url


def as_place(given: object) -> object:
    """Return the text of a URL as it is, any other text as a path."""
    return Path(given) if isinstance(given, str) and not is_url(given) else given


Place = Annotated[Path | str, BeforeValidator(as_place)]


def short_name(place: Path | str) -> str:
    """Return the name up to its first dot."""
    last = place.name if isinstance(place, Path) else place.rstrip("/").rsplit("/", 1)[-1]
    return last.split(".")[0]


def is_there(place: Path | str) -> bool:
    """Say whether a file or folder exists; a server is not asked."""
    return is_url(place) or Path(place).exists()


def resolved(place: Path | str) -> Path | str:
    """Return what is equal for equal places: a path without links, or the URL."""
    return place.resolve() if isinstance(place, Path) else place

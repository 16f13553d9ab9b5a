"""Where data are: a file or folder, or the URL of a store on a server, which a path would not keep whole."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from molkd.cache_schema.remote import is_url
from molkd.pipeline.errors import ConfigError


def as_place(given: object) -> object:
    """Return the text of a URL as it is, any other text as a path."""
    return Path(given) if isinstance(given, str) and not is_url(given) else given


Place = Annotated[Path | str, BeforeValidator(as_place)]


def short_name(place: Path | str) -> str:
    """Return the name up to its first dot."""
    last = place.name if isinstance(place, Path) else place.rstrip("/").rsplit("/", 1)[-1]
    return last.split(".")[0]


def by_short_name(places: Sequence[Path | str], flag: str) -> dict[str, Path | str]:
    """Return places by their short names; raise ConfigError if two have the same."""
    names = {short_name(place): place for place in places}
    if len(names) < len(places):
        raise ConfigError(
            f"{flag}: two files of the same name; rename one, so that results can be told apart"
        )
    return names


def is_there(place: Path | str) -> bool:
    """Say whether a file or folder exists; a server is not asked."""
    return is_url(place) or Path(place).exists()


def resolved(place: Path | str) -> Path | str:
    """Return what is equal for equal places: a path without links, or the URL."""
    return place.resolve() if isinstance(place, Path) else place

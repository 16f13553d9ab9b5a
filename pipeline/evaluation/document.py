"""A report as plain data: sections of text, tables and pictures, before it becomes Markdown or HTML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from molkd.pipeline.evaluation.tables import Column, format_value


class Mark(Enum):
    """How a value stands among the others of its column."""

    NONE = ""
    BEST = "★"
    NEAR = "☆"

    @property
    def words(self) -> str:
        """What the sign says to who does not see it."""
        return {Mark.NONE: "", Mark.BEST: "best", Mark.NEAR: "within the spread of the best"}[self]


@dataclass(frozen=True)
class Cell:
    """Text in a table; `code` is what a machine reads, such as a path or a hash."""

    text: str
    mark: Mark = Mark.NONE
    code: bool = False


@dataclass(frozen=True)
class Table:
    """The first column names the rows."""

    caption: str
    titles: tuple[str, ...]
    is_text: tuple[bool, ...]  # columns to the left; numbers stand to the right
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Picture:
    """One picture, stored as PNG beside the page and held here as SVG."""

    path: str  # of the PNG, from the report's folder
    alt: str
    svg: str
    width: int  # CSS pixels
    height: int


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side where there is room, with one caption."""

    caption: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """Lines for a shell, or of a file."""

    text: str
    language: str = "bash"


@dataclass(frozen=True)
class Link:
    """A line that leads to a file beside the page."""

    text: str
    path: str


@dataclass(frozen=True)
class Tile:
    """One number that matters, with what it is and what to know about it."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Tiles:
    """Numbers to see first."""

    items: tuple[Tile, ...]


@dataclass(frozen=True)
class Details:
    """What a reader opens on demand; paper and Markdown show it."""

    summary: str
    blocks: tuple["Block", ...]


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it, further sections included."""

    title: str
    blocks: tuple["Block", ...]


@dataclass(frozen=True)
class Document:
    """A page."""

    title: str
    lead: tuple["Block", ...]  # before the first section
    sections: tuple[Section, ...]


Block: TypeAlias = Paragraph | Bullets | Code | Link | Table | Gallery | Tiles | Details | Section


def table_of(
    caption: str,
    rows: Sequence[Mapping[str, object]],
    columns: Sequence[Column],
    *,
    marks: Sequence[Mapping[str, Mark]] = (),
    code: frozenset[str] = frozenset(),
) -> Table:
    """Return a table of values, rounded as everywhere.

    Parameters
    ----------
    rows : values under the keys of `columns`
    marks : of each row by key; none by default
    code : keys of columns that hold paths or hashes
    """
    body = tuple(
        tuple(
            Cell(
                format_value(row.get(c.key), c.digits, c.decimals),
                marks[i].get(c.key, Mark.NONE) if marks else Mark.NONE,
                c.key in code and row.get(c.key) is not None,
            )
            for c in columns
        )
        for i, row in enumerate(rows)
    )
    is_text = tuple(all(isinstance(row.get(c.key), str | None) for row in rows) for c in columns)
    return Table(caption, tuple(c.title.replace("\n", " ") for c in columns), is_text, body)

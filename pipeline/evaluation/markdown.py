"""A report's document as Markdown, with its pictures beside it."""

import re
from collections.abc import Iterator, Sequence

from molkd.pipeline.evaluation.document import (
    Block,
    Bullets,
    Cell,
    Code,
    Details,
    Document,
    Gallery,
    Link,
    Paragraph,
    Section,
    Table,
    Tiles,
)
from molkd.pipeline.evaluation.tables import markdown_grid

# What would begin markup or HTML; an underscore inside a word does not.
_SPECIAL = re.compile(r"[\\`*\[\]<>~]|(?<!\w)_|_(?!\w)")
_LINE_START = re.compile(r"^(\s*)([#+-]|\d+[.)])(?=\s)")


def to_markdown(document: Document) -> str:
    """Return the page."""
    parts = [f"# {escape(document.title)}", *_blocks(document.lead, 2), *_blocks(document.sections, 2)]
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, on one line: names in it come from anybody's files."""
    line = _SPECIAL.sub(lambda found: "\\" + found[0], " ".join(text.split()))
    return _LINE_START.sub(r"\1\\\2", line.replace("&", "&amp;"))


def _blocks(blocks: Sequence[Block], level: int) -> Iterator[str]:
    for block in blocks:
        yield from _block(block, level)


def _block(block: Block, level: int) -> Iterator[str]:
    match block:
        case Section(title, inner):
            yield f"{'#' * level} {escape(title)}"
            yield from _blocks(inner, level + 1)
        case Details(summary, inner):
            yield f"**{escape(summary)}**"
            yield from _blocks(inner, level)
        case Paragraph(text):
            yield escape(text)
        case Bullets(items):
            yield "\n".join(f"- {escape(item)}" for item in items)
        case Tiles(items):
            yield "\n".join(
                f"- {escape(tile.label)}: **{escape(tile.value)}** ({escape(tile.note)})" for tile in items
            )
        case Code(text, language):
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
            yield f"{fence}{language}\n{text}\n{fence}"
        case Link(text, path):
            yield f"[{escape(text)}]({path})"
        case Table():
            yield _table(block)
        case Gallery(caption, pictures):
            yield "\n".join(f"![{escape(picture.alt)}]({picture.path})" for picture in pictures)
            yield escape(caption)


def _table(table: Table) -> str:
    body = [[_cell(cell) for cell in row] for row in table.rows]
    return markdown_grid([escape(title) for title in table.titles], table.is_text, body)


def _cell(cell: Cell) -> str:
    if cell.code and "`" not in cell.text:
        return f"`{' '.join(cell.text.split())}`"
    return f"**{escape(cell.text)}** {cell.mark.value}" if cell.mark.value else escape(cell.text)

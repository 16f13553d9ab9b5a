"""A report's document as one HTML file: style and pictures inside, no script, nothing fetched."""

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files

from molkd.pipeline.evaluation.document import (
    Block,
    Bullets,
    Cell,
    Code,
    Details,
    Document,
    Gallery,
    Link,
    Mark,
    Paragraph,
    Picture,
    Section,
    Table,
    Tiles,
)

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="referrer" content="no-referrer">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<header><h1>{title}</h1></header>
<nav aria-label="Contents">
<h2>Contents</h2>
<ol>
{contents}
</ol>
</nav>
<main id="content">
{body}
</main>
</body>
</html>
"""
_DEEPEST = 6
_SMALL = 400  # CSS pixels; of narrower pictures more stand side by side


def to_html(document: Document) -> str:
    """Return the page.

    All text is escaped: names and labels come from anybody's run folders. The policy in the page forbids
    scripts and every request; its only style is the one whose hash it names.
    """
    style = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    anchors = _Anchors()
    named = [(anchors.new(section.title), section) for section in document.sections]
    contents = "\n".join(f'<li><a href="#{a}">{escape(s.title)}</a></li>' for a, s in named)
    parts = [*_blocks(document.lead, 2, anchors)]
    for anchor, section in named:
        parts += _section(section, 2, anchor, anchors)
    return _PAGE.format(
        policy=policy, title=escape(document.title), style=style, contents=contents, body="\n".join(parts)
    )


class _Anchors:
    """Gives every heading an id of its own."""

    def __init__(self) -> None:
        self._taken = {"content"}

    def new(self, title: str) -> str:
        base = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        anchor, number = base, 2
        while anchor in self._taken:
            anchor, number = f"{base}-{number}", number + 1
        self._taken.add(anchor)
        return anchor


def _blocks(blocks: Sequence[Block], level: int, anchors: _Anchors) -> Iterator[str]:
    for block in blocks:
        yield from _block(block, level, anchors)


def _block(block: Block, level: int, anchors: _Anchors) -> Iterator[str]:
    match block:
        case Section(title):
            yield from _section(block, level, anchors.new(title), anchors)
        case Details(summary, inner):
            yield f"<details><summary>{escape(summary)}</summary>"
            yield from _blocks(inner, level, anchors)
            yield "</details>"
        case Paragraph(text):
            yield f"<p>{escape(text)}</p>"
        case Bullets(items):
            yield f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"
        case Tiles(items):
            yield '<dl class="tiles">'
            for tile in items:
                yield (
                    f'<div><dt>{escape(tile.label)}</dt><dd class="value">{escape(tile.value)}</dd>'
                    f"<dd>{escape(tile.note)}</dd></div>"
                )
            yield "</dl>"
        case Code(text=text):
            yield f'<pre tabindex="0"><code>{escape(text)}</code></pre>'
        case Link(text, path):
            yield f'<p><a href="{escape(path)}">{escape(text)}</a></p>'
        case Table():
            yield _table(block)
        case Gallery(caption, pictures):
            yield f"<figure>{_gallery_tag(block)}"
            yield from (_picture(picture) for picture in pictures)
            yield f"</div><figcaption>{escape(caption)}</figcaption></figure>"


def _section(section: Section, level: int, anchor: str, anchors: _Anchors) -> Iterator[str]:
    tag = f"h{min(level, _DEEPEST)}"
    yield f'<section aria-labelledby="{anchor}">'
    yield f'<{tag} id="{anchor}">{escape(section.title)}</{tag}>'
    yield from _blocks(section.blocks, level + 1, anchors)
    yield "</section>"


def _table(table: Table) -> str:
    """Return a table in a box of its own, which scrolls where the page is narrower."""
    kinds = ["text" if is_text else "number" for is_text in table.is_text]
    head = "".join(
        f'<th scope="col" class="{kind}">{escape(title)}</th>'
        for title, kind in zip(table.titles, kinds, strict=True)
    )
    lines = []
    for row in table.rows:
        cells = "".join(_cell(cell, kind) for cell, kind in zip(row[1:], kinds[1:], strict=True))
        lines.append(f'<tr><th scope="row" class="{kinds[0]}">{_words(row[0])}</th>{cells}</tr>')
    body = "\n".join(lines)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(table.caption)}">\n'
        f"<table><caption>{escape(table.caption)}</caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _cell(cell: Cell, kind: str) -> str:
    if cell.mark is Mark.NONE:
        return f'<td class="{kind}">{_words(cell)}</td>'
    sign = f'<span aria-hidden="true">{cell.mark.value}</span><span class="unseen">{cell.mark.words}</span>'
    return f'<td class="{kind} {cell.mark.name.lower()}"><strong>{_words(cell)}</strong> {sign}</td>'


def _words(cell: Cell) -> str:
    return f"<code>{escape(cell.text)}</code>" if cell.code else escape(cell.text)


def _gallery_tag(gallery: Gallery) -> str:
    """Return the opening tag; narrow pictures form a row that a phone scrolls on its own."""
    if any(picture.width >= _SMALL for picture in gallery.pictures):
        return '<div class="gallery">'
    label = escape(f"{len(gallery.pictures)} pictures. {gallery.caption}")
    return f'<div class="gallery small" role="region" tabindex="0" aria-label="{label}">'


def _picture(picture: Picture) -> str:
    """Return the picture as an image of its own document, so that ids inside cannot meet others'."""
    data = base64.b64encode(picture.svg.encode()).decode()
    return (
        f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(picture.alt)}" '
        f'width="{picture.width}" height="{picture.height}">'
    )

"""Sphinx settings of the manual: sphinx-build -W docs OUT, with the extra `docs` installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "molkd"
extensions = ["myst_parser", "sphinx_click"]
html_theme = "furo"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links from pages to files of the repository


def setup(app):
    """Put the tables that are made from code into the pages, whenever the manual is built."""
    import reference

    def fill(_app, _page, source):
        source[0] = reference.fill(source[0])

    def made_from_code(_app, env, *_pages):
        return [p for p in env.found_docs if reference.MARKER.search(Path(env.doc2path(p)).read_text())]

    app.connect("source-read", fill)
    app.connect("env-get-outdated", made_from_code)

"""Sphinx settings of the manual: sphinx-build docs OUT, with the extra `docs` installed."""

project = "molkd"
extensions = ["myst_parser", "sphinx_click"]
html_theme = "furo"
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links from pages to files of the repository

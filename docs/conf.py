"""Sphinx's configuration of the documentation site, which `make docs` builds."""

import sys
from pathlib import Path


DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "extensions")]

from hf_unigd.version import __version__  # noqa: E402


project = "hf-unigd"
author = "The hf-unigd contributors"
release = version = __version__
language = "en"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "command_reference",
    "docstrings",
    "repository_links",
]
exclude_patterns = ["extensions"]
nitpicky = True  # a reference that leads nowhere is a warning, and `make docs` makes warnings errors
repository = "https://github.com/hf-unigd/hf-unigd"

# Headings have the anchors that GitHub gives them.
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # those of transformers are written for its own site
autodoc_default_options = {"exclude-members": "config_class"}
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = "hf-unigd"
html_theme_options = {"source_repository": repository, "source_branch": "main", "source_directory": "docs/"}

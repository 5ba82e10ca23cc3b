"""
Links out of docs/ into the repository lead to the repository's page.

A page names a file of the repository by its relative path, which GitHub follows. The site holds the pages alone.
"""

import re
from os.path import normpath
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging


logger = logging.getLogger(__name__)

LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]*)")


def page_of(file: str, root: Path, repository: str) -> str | None:
    """The repository's page of a file or folder below `root`, by its path from there. None if there is no such one."""
    path = (root / file).resolve()
    if not path.exists() or not path.is_relative_to(root.resolve()):
        return None
    return f"{repository}/{'tree' if path.is_dir() else 'blob'}/main/{path.relative_to(root.resolve()).as_posix()}"


def link_to_repository(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replaces the links of a page that leave the folder of the documentation."""
    pages = Path(app.srcdir)

    def replaced(link: re.Match[str]) -> str:
        target = normpath(Path(docname).parent / link[1])
        if not target.startswith(".."):
            return link[0]
        page = page_of(f"{pages.name}/{target}", pages.parent, app.config.repository)
        if page is None:
            logger.warning("the repository has no %s", link[1], location=docname)
        return f"]({page or link[1]}"

    if app.env.doc2path(docname).suffix == ".md":
        source[0] = LINK.sub(replaced, source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_config_value("repository", "", "env", str)
    app.connect("source-read", link_to_repository)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

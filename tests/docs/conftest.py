import sys
from pathlib import Path

import pytest
from sphinx.cmd.build import build_main


DOCS = Path(__file__).parents[2] / "docs"
sys.path.append(str(DOCS / "extensions"))


@pytest.fixture
def build(tmp_path, capfd):
    """
    Builds a site of some pages as `make docs` does. Returns what is wrong with it, which is nothing if it was built.

    Its files are in `site`. `docs` and `code` are the folders of the repository.
    """
    (tmp_path / "code").mkdir()

    def run(**pages: str) -> str:
        source = tmp_path / "docs"
        source.mkdir()
        for name, text in pages.items():
            (source / f"{name}.md").write_text(text)
        options = ["-E", "-W", "--keep-going", "-q"]
        failed = build_main([*options, "-c", str(DOCS), str(source), str(tmp_path / "site")])
        warnings = capfd.readouterr().err
        assert bool(failed) == ("WARNING" in warnings), warnings
        return warnings

    return run

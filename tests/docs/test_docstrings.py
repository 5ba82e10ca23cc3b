"""Docstrings in Markdown become what Sphinx reads, and every reference in them leads somewhere."""

import ast
from importlib import import_module
from pathlib import Path

import pytest
from docstrings import REFERENCE, full_name, help_texts, packages, to_rst

import hf_unigd
from hf_unigd.data import RowParser, rows
from hf_unigd.modeling import UniGDForConditionalGeneration
from hf_unigd.serving.limits import Limits


PACKAGE = Path(hf_unigd.__file__).parent


@pytest.mark.parametrize(
    ("markdown", "rst"),
    [
        ("the `name` of it", "the ``name`` of it"),
        ("`ValueError`s and sub`code`", "``ValueError``\\ s and sub\\ ``code``"),
        ("[`RowError`] of [`x <a.b.x>`]", ":py:obj:`RowError` of :py:obj:`x <a.b.x>`"),
        ("[VladVA](https://arxiv.org/abs/2412.04378)", "`VladVA <https://arxiv.org/abs/2412.04378>`__"),
        ("an *optional* **kwargs, a_ and 2 * 3 | 4", "an *optional* \\*\\*kwargs, a\\_ and 2 \\* 3 \\| 4"),
        ("Two:\n- `a`\n  and so on\n- b", "Two:\n\n- ``a``\n  and so on\n- b"),
        ("Args:\n    > Of the objective\n\n    a: One.", "Args:\n    Of the objective\n\n    a: One."),
        ("Example:\n\n```python\na = `b`\n```\nEnd.", "Example:\n\n.. code-block:: python\n\n    a = `b`\n\nEnd."),
        ("The loss is:\n\n    L = a * b_\n\nwith `a`.", "The loss is::\n\n    L = a * b_\n\nwith ``a``."),
        ("    x: As in:\n\n    y: Not `a` block.", "    x: As in:\n\n    y: Not ``a`` block."),
    ],
)
def test_markdown_becomes_restructuredtext(markdown, rst):
    assert to_rst(markdown) == rst


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("match_every_caption", "hf_unigd.data.rows.RowParser.match_every_caption"),  # of the class
        ("RowError", "hf_unigd.data.rows.RowError"),  # of the module
        ("UniGDProcessor.process_sequences", "hf_unigd.UniGDProcessor.process_sequences"),  # of a package
        ("transformers.Trainer", "transformers.Trainer"),
        ("hf_unigd.data.images.open_image", "hf_unigd.data.images.open_image"),
        ("hf_unigd.data.images", "hf_unigd.data.images"),
        ("open_images", None),
        ("RowParser.nothing", None),
        ("hf_unigd.data.images.nothing", None),
        ("hf_unigd.nothing", None),
    ],
)
def test_a_name_means_what_it_means_to_python(name, full):
    assert full_name(name, RowParser, rows) == full


def test_an_attribute_that_is_inherited_or_only_annotated_counts():
    module = import_module("hf_unigd.modeling.modeling_unigd")
    assert full_name("from_vlm", UniGDForConditionalGeneration, module).endswith("Generation.from_vlm")
    assert full_name("Hit.score", None, import_module("hf_unigd.retrieval.entries")).endswith("Hit.score")


def references(file: Path):
    """The references in all docstrings of a file, with the names of the classes that they stand in."""

    def visit(node: ast.AST, classes: list[str]):
        if isinstance(node, ast.ClassDef):
            classes = [*classes, node.name]
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for found in REFERENCE.finditer(ast.get_docstring(node) or ""):
                yield found["name"].removeprefix("~"), classes
        for child in ast.iter_child_nodes(node):
            yield from visit(child, classes)

    yield from visit(ast.parse(file.read_text(encoding="utf-8")), [])


def test_every_reference_in_the_package_leads_somewhere():
    seen, lost = 0, []
    for file in PACKAGE.rglob("*.py"):
        for name, classes in references(file):
            module = import_module(".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts))
            owner = module
            for each in classes:
                owner = getattr(owner, each)
            seen += 1
            if full_name(name, owner if classes else None, module) is None:
                lost.append(f"{file.relative_to(PACKAGE.parent)}: [`{name}`]")
    assert seen > 200
    assert lost == []


def test_a_docstring_without_fields_gets_the_help_texts():
    assert "\n    batch_window_ms: How long the first request of a batch waits" in help_texts(Limits)
    assert help_texts(RowParser) == help_texts(rows.RowError) == ""


def test_every_package_has_a_page():
    pages = PACKAGE.parent / "docs" / "reference"
    for package in packages():
        page = (pages / f"{package.__name__.rpartition('.')[2]}.rst").read_text(encoding="utf-8")
        if package is hf_unigd:
            assert all(f"{package.__name__}.{name}" in page or name == "__version__" for name in package.__all__)
        else:
            assert f".. automodule:: {package.__name__}\n   :members:\n" in page

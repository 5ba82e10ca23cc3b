"""The imports of the package follow the order in CONTRIBUTING.md and form no circle.

The files are parsed, not imported, so imports inside functions and under `TYPE_CHECKING` count as well.
"""

import ast
import re
import sys
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "hf_unigd"

# From top to bottom. A folder may import the layers below it, not its own layer. `hf_unigd` is `hf_unigd/__init__.py`.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"quickstart"},
    {"hf_unigd"},
    {"serving"},
    {"trainer"},
    {"evaluation"},
    {"retrieval"},
    {"bulk"},
    {"data", "hub", "registration"},
    {"modeling"},
    {"inputs", "kernels", "outputs", "settings", "version"},
]
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}
# The command `hf-unigd kernels` exports the kernels.
KERNEL_USERS = {"trainer", "evaluation", "cli.kernels"}

# These folders are copied out of the package. SIBLINGS is how their files may name each other: transformers' copier
# follows `from .file import name` alone. Loading a folder may import REQUIRED; functions, and files that loading the
# folder does not import, may also import OPTIONAL.
SIBLINGS = {"modeling": r"\.\w+", "kernels": r"\.\w*"}
REQUIRED = {"modeling": {"torch", "transformers", "PIL", "jinja2", "numpy", "safetensors"}, "kernels": {"torch"}}
OPTIONAL = {"modeling": {"peft", "sentence_transformers"}, "kernels": {"triton"}}


@dataclass(frozen=True)
class Import:
    """One imported name.

    Attributes:
        module: The importing module, such as "hf_unigd.data.rows".
        target: The imported module of the same package, or the top-level name of another package.
        written: The source as the import statement names it: "..data", "." or "torch.nn".
        is_lazy: Whether the import stands inside a function.
        line: The line of the statement.
    """

    module: str
    target: str
    written: str
    is_lazy: bool
    line: int

    def __str__(self):
        return f"{self.module}, line {self.line}: {self.target}"


def modules_of(package: Path) -> dict[str, Path]:
    """The files of a package by module name. The name of a folder stands for its `__init__.py`."""
    modules = {}
    for file in package.rglob("*.py"):
        parts = file.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return modules


def imports_of(package: Path) -> list[Import]:
    modules = modules_of(package)
    found = []

    def visit(node, module, is_lazy):
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(module, alias.name, alias.name, is_lazy, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")
            if modules[module].name != "__init__.py":
                above = above[:-1]
            above = above[: len(above) - node.level + 1] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{start}.{alias.name}"
                written = "." * node.level + (node.module or "")
                add(module, name if name in modules else start, written, is_lazy, node.lineno)
        is_lazy = is_lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, module, is_lazy)

    def add(module, target, written, is_lazy, line):
        first = target.split(".")[0]
        assert first != package.name or target in modules, f"{module}, line {line}: there is no module {target}"
        found.append(Import(module, target if first == package.name else first, written, is_lazy, line))

    for module, file in modules.items():
        visit(ast.parse(file.read_text()), module, is_lazy=False)
    return found


def find_circle(imports: list[Import], package: str) -> list[str]:
    """A circle of modules, whose first is also its last; an empty list where there is none."""
    graph: dict[str, set[str]] = {}
    for one in imports:
        if one.target.split(".")[0] == package:
            graph.setdefault(one.module, set()).add(one.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def folder_of(module: str) -> str:
    """The part of `hf_unigd` that a module belongs to: a folder, or a file at its top."""
    return module.split(".")[1] if "." in module else module


def against_the_layers(imports: list[Import]) -> list[Import]:
    wrong = []
    for one in imports:
        if one.target.split(".")[0] != "hf_unigd":
            continue
        source, target = folder_of(one.module), folder_of(one.target)
        if source == target:
            continue
        is_wrong = LAYER_OF[target] <= LAYER_OF[source]
        if target == "kernels":
            is_wrong = not {source, one.module.removeprefix("hf_unigd.")} & KERNEL_USERS
        if is_wrong:
            wrong.append(one)
    return wrong


def foreign_imports(imports: list[Import], folder: str) -> list[Import]:
    """Imports of a folder that would fail where the folder has been copied out of the package."""
    inside = [one for one in imports if folder_of(one.module) == folder]
    loaded, to_read = set(), [f"hf_unigd.{folder}"]
    while to_read:
        module = to_read.pop()
        if module not in loaded:
            loaded.add(module)
            to_read += [one.target for one in inside if one.module == module and not one.is_lazy]
    wrong = []
    for one in inside:
        if one.target.split(".")[0] == "hf_unigd":
            if not re.fullmatch(SIBLINGS[folder], one.written):
                wrong.append(one)
        elif one.target in OPTIONAL[folder]:
            if not one.is_lazy and one.module in loaded:
                wrong.append(one)
        elif one.target not in REQUIRED[folder] | sys.stdlib_module_names:
            wrong.append(one)
    return wrong


@pytest.fixture(scope="module")
def imports():
    return imports_of(PACKAGE)


def test_imports_form_no_circle(imports):
    assert len(imports) > 500
    assert find_circle(imports, "hf_unigd") == []


def test_every_folder_has_a_layer():
    assert {folder_of(module) for module in modules_of(PACKAGE)} == set(LAYER_OF)


def test_imports_follow_the_layers(imports):
    assert [str(one) for one in against_the_layers(imports)] == []


@pytest.mark.parametrize("folder", REQUIRED)
def test_a_copied_folder_imports_what_it_may(imports, folder):
    assert [str(one) for one in foreign_imports(imports, folder)] == []


def test_no_test_imports_another():
    tests = Path(__file__).parent
    found = [one for one in imports_of(tests) if one.target.startswith("test_")]
    assert [str(one) for one in found] == []


def write_package(folder: Path, **files: str) -> Path:
    """Writes a package `hf_unigd`. Two underscores in a file's name separate its folder."""
    package = folder / "hf_unigd"
    for name, text in files.items():
        file = package / (name.replace("__", "/") + ".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        for parent in file.relative_to(folder).parents[:-1]:
            (folder / parent / "__init__.py").touch()
    return package


@pytest.mark.parametrize(
    ("back", "circle"),
    [
        ("from . import a", ["a", "b", "c", "a"]),
        ("from .a import thing", ["a", "b", "c", "a"]),
        ("import hf_unigd.a", ["a", "b", "c", "a"]),
        ("def f():\n    from hf_unigd import a", ["a", "b", "c", "a"]),
        ("if TYPE_CHECKING:\n    from .a import Thing", ["a", "b", "c", "a"]),
        ("from .d import a", []),
        ("import a", []),
    ],
)
def test_a_circle_of_three_is_found(tmp_path, back, circle):
    package = write_package(tmp_path, a="from .b import x", b="from . import c", c=back, d="")
    found = find_circle(imports_of(package), "hf_unigd")
    assert sorted(set(found)) == [f"hf_unigd.{name}" for name in sorted(set(circle))]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("data__rows", "from ..trainer import x"),
        ("data__rows", "from .. import trainer"),
        ("data__rows", "from ..hub.cards import x"),
        ("hub__cards", "def f():\n    import hf_unigd.data"),
        ("retrieval__index", "from .. import x"),
        ("data__rows", "from ..kernels import x"),
        ("cli__train", "from ..kernels import x"),
        ("kernels__ops", "from ..version import x"),
    ],
)
def test_an_import_against_the_layers_is_found(tmp_path, module, text):
    files = {"trainer__a": "", "hub__cards": "", "data__rows": "", "kernels__ops": "", "version": "", module: text}
    found = against_the_layers(imports_of(write_package(tmp_path, **files)))
    assert [one.module for one in found] == [f"hf_unigd.{module.replace('__', '.')}"]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("trainer__a", "from ..data.rows import x\nfrom ..kernels.ops import y\nfrom ..version import z"),
        ("cli__kernels", "from ..kernels.ops import x\nfrom .. import y"),
    ],
)
def test_an_import_along_the_layers_is_allowed(tmp_path, module, text):
    files = {"data__rows": "import data", "kernels__ops": "", "version": "", module: text}
    assert against_the_layers(imports_of(write_package(tmp_path, **files))) == []


@pytest.mark.parametrize(
    ("folder", "text", "is_allowed"),
    [
        ("modeling", "import json\nfrom torch import nn\nfrom PIL import Image\nfrom .other import x", True),
        ("modeling", "def f():\n    from peft import PeftModel", True),
        ("modeling", "from peft import PeftModel", False),
        ("modeling", "def f():\n    import pandas", False),
        ("modeling", "from hf_unigd.modeling.other import x", False),
        ("modeling", "from . import other", False),
        ("modeling", "from ..version import x", False),
        ("modeling", "from ..modeling.other import x", False),
        ("kernels", "def f():\n    import triton.language as tl", True),
        ("kernels", "import triton", False),
        ("kernels", "from . import other", True),
        ("kernels", "import transformers", False),
        ("kernels", "from ..version import x", False),
    ],
)
def test_what_a_copied_folder_may_import(tmp_path, folder, text, is_allowed):
    files = {f"{folder}__other": "", f"{folder}__file": text, "version": ""}
    package = write_package(tmp_path, **files)
    (package / folder / "__init__.py").write_text("from .file import x")
    assert (foreign_imports(imports_of(package), folder) == []) == is_allowed


def test_only_files_that_loading_does_not_import_may_import_optional_packages(tmp_path):
    package = write_package(tmp_path, kernels__ops="def f():\n    from . import fast", kernels__fast="import triton")
    assert foreign_imports(imports_of(package), "kernels") == []
    (package / "kernels" / "ops.py").write_text("from . import fast")
    (package / "kernels" / "__init__.py").write_text("from . import ops")
    assert [one.module for one in foreign_imports(imports_of(package), "kernels")] == ["hf_unigd.kernels.fast"]

"""What the remote code may do, read from its syntax trees, and whose code this package trusts."""

import ast
from pathlib import Path

import pytest

import hf_unigd


PACKAGE = Path(hf_unigd.__file__).parent
REMOTE_CODE = sorted((PACKAGE / "modeling").glob("*_unigd.py"))

# torch and transformers, and what transformers itself cannot do without for images, chat templates and weights.
LIBRARIES = {"torch", "transformers", "PIL", "jinja2", "numpy", "safetensors"}
# Neither a network nor a process nor code can be reached from these.
STANDARD = {"collections", "contextlib", "dataclasses", "functools", "inspect", "itertools", "json", "logging"} | {
    *("bisect", "datetime", "fnmatch", "hashlib", "math", "os", "pathlib", "re", "shutil", "threading", "types"),
    *("typing", "warnings"),
}
# Only sentence-transformers loads this file.
GUESTS = {"sentence_unigd.py": {"sentence_transformers"}}
# All that is used of `os` and `shutil`.
OF_OS, OF_SHUTIL = {"os.PathLike", "os.path"}, {"shutil.copyfile"}
EVALUATES = {"eval", "exec", "compile", "__import__", "globals", "breakpoint", "input"}
# Every function that opens, writes or removes a file: one of the checkpoint's, or an image that the user names.
FILES = {
    "checkpoint_unigd.py": {"save_companions", "_save_sentence_module"},
    "probe_unigd.py": {"save_probe", "load_probe"},
    "processing_unigd.py": {"save_pretrained"},
    "images_unigd.py": {"_read_header"},
    "sentence_files_unigd.py": {"save_sentence_files"},
    "hub_files_unigd.py": {"read_json"},
    "digests_unigd.py": {"digests_of_tensors", "_digests_of_files", "_write"},
    "plausible_unigd.py": {"_tensor_sizes"},
    "save_folder_unigd.py": {"_names"},
}
OPENS = {
    *("open", "read_text", "read_bytes", "write_text", "write_bytes", "unlink", "rmdir", "rename", "replace_file"),
    *("load_file", "save_file", "safe_open", "copyfile", "mkdir", "touch", "symlink_to", "hardlink_to", "chmod"),
    *("glob", "iterdir"),
}


def tree(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def imported(module):
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def called(node):
    """The name of the function that a call calls, without its module: `open` of `Image.open(...)`."""
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)


def test_a_checkpoint_holds_exactly_this_code(llava, tmp_path):
    model, model.processor = llava
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.glob("*.py")} == {file.name for file in REMOTE_CODE}
    for file in REMOTE_CODE:
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("file", REMOTE_CODE, ids=lambda file: file.name)
class TestRemoteCode:
    def test_imports_little(self, file):
        siblings = {f".{other.stem}" for other in REMOTE_CODE}
        allowed = LIBRARIES | STANDARD | GUESTS.get(file.name, set())
        for name in imported(tree(file)):
            assert name in siblings or (not name.startswith(".") and name.partition(".")[0] in allowed), name

    def test_reaches_no_further_through_them(self, file):
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = f"{node.value.id}.{node.attr}"
                assert node.value.id != "os" or name in OF_OS, name
                assert node.value.id != "shutil" or name in OF_SHUTIL, name
                assert name not in {"torch.load", "torch.hub", "torch.ops"}, name

    def test_evaluates_nothing(self, file):
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in EVALUATES, ast.unparse(node)

    def test_opens_files_in_known_places_alone(self, file):
        def functions(node, name=None):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                name = node.name
            if isinstance(node, ast.Call) and called(node) in OPENS:
                yield name
            for child in ast.iter_child_nodes(node):
                yield from functions(child, name)

        assert set(functions(tree(file))) <= FILES.get(file.name, set())


@pytest.mark.parametrize("code", ["import socket", "import urllib.request", "from ..hub import x", "import requests"])
def test_the_test_would_notice_an_import(code, tmp_path):
    file = tmp_path / "evil_unigd.py"
    file.write_text(code)
    with pytest.raises(AssertionError):
        TestRemoteCode().test_imports_little(file)


@pytest.mark.parametrize("code", ["open('/etc/passwd')", "def save_probe(): Path(x).read_text()", "Image.open(x)"])
def test_the_test_would_notice_a_file(code, tmp_path):
    file = tmp_path / "evil_unigd.py"
    file.write_text(code)
    with pytest.raises(AssertionError):
        TestRemoteCode().test_opens_files_in_known_places_alone(file)


def test_we_trust_no_code_that_the_user_did_not_name():
    """Only users decide on `trust_remote_code=True`."""

    def is_true(node):
        return isinstance(node, ast.Constant) and bool(node.value)

    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert not is_true(node.value), file
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    assert not (isinstance(key, ast.Constant) and key.value == "trust_remote_code" and is_true(value))

"""The build of the C++ backend: not at import, once for all processes, and with eager if it fails."""

import os
import shutil
import subprocess
import sys

import pytest

from hf_unigd.kernels import compiled


USE = """
import warnings
warnings.simplefilter("always")
import torch
from hf_unigd.kernels import alignment_kernel, compiled
x, offsets = torch.randn(9, 4), torch.tensor([0, 4, 9])
for _ in range(3):
    alignment_kernel(x, offsets, bandwidth=1.0, backend={backend!r}).sum()
print("built:", compiled.is_available())
"""


def start(cache, backend="auto", **environment):
    return subprocess.Popen(
        [sys.executable, "-c", USE.format(backend=backend)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(cache), **environment},
    )


def test_import_compiles_nothing(tmp_path):
    code = "import hf_unigd.kernels, hf_unigd.kernels.compiled as c; print(c._library.cache_info().currsize)"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert output.stdout.strip() == "0"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["auto", "compiled"])
def test_without_a_compiler_eager_runs_and_says_so_once(tmp_path, backend):
    process = start(tmp_path, backend, CXX="/nonexistent/c++")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert output.strip() == "built: False"
    assert errors.count("could not be built, so the eager backend is used") == 1
    assert "C++20 compiler" in errors


def test_processes_that_start_together_build_once(compiled_backend, tmp_path):
    processes = [start(tmp_path) for _ in range(2)]
    results = [process.communicate() for process in processes]
    assert all(process.returncode == 0 for process in processes), results
    assert [output.strip() for output, _ in results] == ["built: True"] * 2
    assert sum("Building the C++ backend" in errors for _, errors in results) == 1
    assert [path.suffix for path in sorted((tmp_path / "unigd").iterdir())] == [".lock", ".so"]


@pytest.mark.skipif(sys.platform != "linux", reason="built without OpenMP")
def test_the_build_uses_threads(compiled_backend):
    """Without OpenMP, at::parallel_for runs on one thread and every result is still right, so no other test fails."""
    library = compiled._build(sorted(compiled.SOURCES.glob("*.cpp"))).read_bytes()
    assert b"GOMP_parallel" in library or b"__kmpc_fork_call" in library


def test_other_flags_versions_or_sources_build_another_library(monkeypatch, tmp_path):
    """The name depends on flags, torch version and sources, so that no stale library is loaded."""
    names = [compiled._library_name()]
    sources = shutil.copytree(compiled.SOURCES, tmp_path / "sources")
    monkeypatch.setattr(compiled, "SOURCES", sources)
    assert compiled._library_name() == names[0]
    with next(sources.glob("*.cpp")).open("a") as file:
        file.write("\n")
    names.append(compiled._library_name())
    monkeypatch.setattr(compiled.torch, "__version__", "2.99.0")
    names.append(compiled._library_name())
    monkeypatch.setattr(compiled, "FLAGS", [*compiled.FLAGS, "-DX"])
    names.append(compiled._library_name())
    assert len(set(names)) == 4

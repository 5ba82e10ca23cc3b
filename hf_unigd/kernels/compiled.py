"""The C++ backend for the CPU. It is built at first use, cached, and optional: without a compiler, eager runs."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import shutil
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .problem import Problem


logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
# at::parallel_for is a template. Compiled without this flag, it silently runs on one thread. torch has already loaded
# the OpenMP runtime, and a library of the same name is not loaded twice. Apple's compiler has no OpenMP.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", *OPENMP]
# Linear arithmetic in doubles is used if no |log| can exceed this many nats (csrc/recursion.h). Doubles hold 708.
LINEAR_LIMIT = 700.0
# -1 is the best instruction set of the processor, 0 the baseline, 1 AVX2 and 2 AVX-512.
INSTRUCTION_SET = -1


def forward(problem: Problem) -> Tensor:
    return _align(problem, None)[0]


def backward(problem: Problem, grad: Tensor) -> tuple[Tensor, Tensor | None, float]:
    _, dx, dy, by_log_scale = _align(problem, grad)
    return dx, None if problem.y is None else dy, -2 * by_log_scale / problem.bandwidth


def _align(problem: Problem, grad: Tensor | None) -> tuple[Tensor, Tensor, Tensor, float]:
    x, y = problem.x, problem.y
    return _library().align(
        x.slices,
        x.offsets,
        x.modalities,
        None if y is None else y.slices,
        None if y is None else y.offsets,
        None if y is None else y.modalities,
        None if problem.pairs is None else problem.pairs.contiguous(),
        grad,
        [value for entry in problem.modality_columns for value in entry],
        problem.scale,
        problem.per_pair_bandwidth,
        problem.local == "gaussian",
        problem.bfloat16,
        LINEAR_LIMIT,
        INSTRUCTION_SET,
    )


def is_available() -> bool:
    """Returns whether the library can be used, building it if necessary. A failed build warns once and says why."""
    return _library() is not None


@functools.cache
def _library() -> Any:
    sources = sorted(SOURCES.glob("*.cpp"))
    if not sources:  # the Hub export has no C++ sources
        return None
    try:
        path = _build(sources)
        torch.ops.load_library(path)
    except Exception as error:  # any failure of the toolchain falls back to the eager backend
        last = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        warnings.warn(
            f"The C++ backend of hf_unigd.kernels could not be built, so the eager backend is used, which is about a "
            f"hundred times slower. The build failed with: {last} The build needs a C++20 compiler (g++ 10, or clang "
            "12 with libomp) and ninja (`pip install ninja`).",
            RuntimeWarning,
            stacklevel=2,
        )
        logger.debug("The build failed", exc_info=error)
        return None
    return getattr(torch.ops, path.stem)


def _library_name() -> str:
    digest = hashlib.sha256("\n".join([torch.__version__, *FLAGS]).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.read_bytes())
    return f"unigd_{digest.hexdigest()[:16]}"


def _build(sources: list[Path]) -> Path:
    """Returns the path of the shared library and compiles it if it is not cached. Its name is a hash of its inputs."""
    from torch.utils import cpp_extension

    name = _library_name()
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    cache = Path(root) / "unigd"
    library = cache / f"{name}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{name}.lock"), _ninja_on_path():
        if library.exists():  # another process has built it in the meantime
            return library
        logger.warning(
            "Building the C++ backend of hf_unigd.kernels, which takes about half a minute. It is cached in %s.", cache
        )
        with tempfile.TemporaryDirectory(dir=cache) as directory:
            cpp_extension.load(
                name=name,
                sources=[str(path) for path in sources],
                extra_cflags=FLAGS,
                extra_ldflags=OPENMP,
                build_directory=directory,
                is_python_module=False,
            )
            # The rename is atomic, so no process loads a half-written library.
            (Path(directory) / f"{name}.so").replace(library)
    return library


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lets one process build at a time. The operating system releases the lock when the process ends."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Adds the interpreter's folder to PATH: pip installs ninja there, and only an activated environment has it."""
    path = os.environ.get("PATH", "")
    if shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), path])
    try:
        yield
    finally:
        os.environ["PATH"] = path

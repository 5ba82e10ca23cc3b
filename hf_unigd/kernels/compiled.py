"""C++ on the CPU: built at first use by torch's extension builder, cached, and never needed."""

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
# Without the flag at::parallel_for, a template of torch's, runs on one thread and says nothing. The runtime is the one
# that torch has loaded: the same name is not loaded twice. Apple's compiler has none.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", *OPENMP]
# The largest |log| that linear arithmetic in doubles is trusted with, in nats (csrc/recursion.h); doubles hold 708.
LINEAR_LIMIT = 700.0
# -1: the best this processor has; 0: baseline, 1: AVX2, 2: AVX-512.
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
        [value for space in problem.modality_columns for value in space],
        problem.scale,
        problem.per_pair_bandwidth,
        problem.local == "gaussian",
        problem.bfloat16,
        LINEAR_LIMIT,
        INSTRUCTION_SET,
    )


def is_available() -> bool:
    """Whether the library is there, building it if need be. Says once when it is not, and why."""
    return _library() is not None


@functools.cache
def _library() -> Any:
    sources = sorted(SOURCES.glob("*.cpp"))
    if not sources:  # the export for the Hub has none
        return None
    try:
        path = _build(sources)
        torch.ops.load_library(path)
    except Exception as error:  # whatever goes wrong in somebody's toolchain, there is the eager backend
        last = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        warnings.warn(
            f"The C++ backend of hf_unigd.kernels could not be built, so the eager one is used, which is some hundred "
            f"times slower: {last} A C++20 compiler (g++ 10, or clang 12 with libomp) and `pip install ninja` are all "
            "it needs.",
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
    """The shared library's path; compiles it unless the cache has it. Its name tells everything it depends on."""
    from torch.utils import cpp_extension

    name = _library_name()
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    cache = Path(root) / "unigd"
    library = cache / f"{name}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{name}.lock"), _ninja_on_path():
        if library.exists():  # another process was first
            return library
        logger.warning("Building the C++ backend of hf_unigd.kernels, once: about half a minute. Cached in %s.", cache)
        with tempfile.TemporaryDirectory(dir=cache) as directory:
            cpp_extension.load(
                name=name,
                sources=[str(path) for path in sources],
                extra_cflags=FLAGS,
                extra_ldflags=OPENMP,
                build_directory=directory,
                is_python_module=False,
            )
            # Into place in one step: nobody ever loads half a library.
            (Path(directory) / f"{name}.so").replace(library)
    return library


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process builds. The kernel drops the lock with its holder: none is left behind."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """pip puts ninja beside the interpreter, which is not on the PATH of an environment that was not activated."""
    path = os.environ.get("PATH", "")
    if shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), path])
    try:
        yield
    finally:
        os.environ["PATH"] = path

"""Exports this folder as a repository for Hugging Face's `kernels` library: one universal Python and Triton build."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


NAME = "unigd-alignment"
VERSION = 1

CARD = """---
library_name: kernels
license: apache-2.0
tags:
- kernel
- global-alignment-kernel
- soft-dtw
---

# Global alignment kernels and soft-DTW

These functions compute log K between variable-length embedding sequences, for all pairs of a batch or for given pairs,
with gradients to the features and the bandwidth. They run in Triton on CUDA and in batched PyTorch elsewhere. They are
part of hf-unigd, which adds a C++ backend for the CPU.

```python
import torch
from kernels import get_kernel

kernel = get_kernel("<this repository>", version={version}, trust_remote_code=True)
x = torch.nn.functional.normalize(torch.randn(9, 64), dim=-1)
log_k = kernel.alignment_kernel(x, torch.tensor([0, 4, 9]), bandwidth=1.0)  # two sequences of 4 and 5 slices
```
"""


def export(directory: str | Path) -> Path:
    """Writes the repository into `directory`, a new or empty folder, and returns the path of the build.

    The exported operators have their own namespace, so that the export and hf_unigd.kernels can be loaded together.

    Raises:
        ValueError: If `directory` is a file or is not empty.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"`directory` must be a new or empty folder, but {directory} is not.")
    here = Path(__file__).parent
    sources = {path.name: path.read_text() for path in sorted(here.glob("*.py")) if path != Path(__file__)}
    digest = hashlib.sha256("".join(sources.values()).encode()).hexdigest()[:8]
    identity = f"_{NAME.replace('-', '_')}_{digest}"
    sources["namespace.py"] = sources["namespace.py"].replace('"unigd"', f'"{identity}"')
    metadata = {
        "name": NAME,
        "id": identity,
        "version": VERSION,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    build = directory / "build" / "torch-universal"
    build.mkdir(parents=True)
    for name, text in sources.items():
        (build / name).write_text(text)
    (build / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    (directory / "README.md").write_text(CARD.format(version=VERSION))
    return build

"""The export of the folder as a repository for Hugging Face's `kernels` library."""

import json
import re
from pathlib import Path

import pytest
import torch

from hf_unigd import kernels as ours
from hf_unigd.cli.main import main
from hf_unigd.kernels.export import export
from kernel_cases import assert_close, packed


def test_loads_with_the_kernels_library_beside_our_own(tmp_path, capsys):
    kernels = pytest.importorskip("kernels")
    main(["kernels", "export", str(tmp_path / "repository")])
    assert "torch-universal" in capsys.readouterr().out
    theirs = kernels.get_local_kernel(tmp_path / "repository")
    assert "hf_unigd" not in theirs.__name__
    x, offsets = packed([3, 7, 2], 5)
    x.requires_grad_()
    for module in (theirs, ours):
        log_k = module.alignment_kernel(x, offsets, bandwidth=1.5)
        (gradient,) = torch.autograd.grad(log_k.square().sum(), x)
        if module is theirs:
            expected = log_k.detach(), gradient
    assert_close(log_k.detach(), expected[0], 1e-12)
    assert_close(gradient, expected[1], 1e-11)
    assert_close(theirs.soft_dtw(x, offsets).detach(), ours.soft_dtw(x, offsets).detach(), 1e-12)


def test_is_pure_python_with_a_namespace_of_its_own(tmp_path):
    build = export(tmp_path)
    metadata = json.loads((build / "metadata.json").read_text())
    assert {path.suffix for path in build.iterdir()} == {".py", ".json"}
    imports = [line for path in build.glob("*.py") for line in path.read_text().splitlines() if "import " in line]
    assert len(imports) > 20 and not any("hf_unigd" in line for line in imports)
    assert metadata["id"] in (build / "namespace.py").read_text()
    assert (tmp_path / "README.md").read_text().startswith("---\nlibrary_name: kernels\n")


def test_the_guide_runs(tmp_path, monkeypatch):
    pytest.importorskip("kernels")
    guide = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    export("DIR")
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert names["log_k"].shape == (2, 2)


def test_refuses_a_folder_in_use(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`directory` must be a new or empty folder"):
        export(tmp_path)
    with pytest.raises(SystemExit, match="is not empty"):
        main(["kernels", "export", str(tmp_path)])

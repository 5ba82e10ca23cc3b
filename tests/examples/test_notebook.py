"""The notebook runs from its first cell to its last, with a few training steps."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient


ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "notebooks" / "retrieve_and_speak.ipynb"


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kept = [cell.get("outputs") for cell in notebook.cells]
    (parameters,) = (
        place for place, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])
    )
    notebook.cells.insert(parameters + 1, nbformat.v4.new_code_cell("steps = 2"))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    del notebook.cells[parameters + 1]

    assert (tmp_path / "runs" / "notebook" / "model.safetensors").is_file()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "992 entries of width 128" in printed and "Which colour is it?" in printed

    # What stands in the file is from a run of these cells: the same kinds of pictures, and no cell left out.
    def pictures(outputs):
        return sum("image/png" in output.get("data", {}) for output in outputs or [])

    for cell, outputs in zip(notebook.cells, kept, strict=True):
        assert pictures(cell.get("outputs")) == pictures(outputs), cell.source


def test_the_notebook_is_small_and_shows_no_warnings():
    assert NOTEBOOK.stat().st_size < 500_000
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not any(output.get("name") == "stderr" or output.output_type == "error" for output in outputs)

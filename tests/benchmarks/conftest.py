import sys
from pathlib import Path


# Only while these two are imported: retrieval.py there would hide other modules of its name.
_FOLDER = str(Path(__file__).parents[2] / "benchmarks")
sys.path.append(_FOLDER)
import ablation_parts  # noqa: E402, F401
import openclipart  # noqa: E402, F401


sys.path.remove(_FOLDER)

import sys
from pathlib import Path


# Last, as kernels.py there would hide Hugging Face's library `kernels`.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

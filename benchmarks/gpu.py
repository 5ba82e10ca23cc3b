"""Measures one CUDA GPU: `python benchmarks/gpu.py [kernels] [train] [sugar] [embed] [generate] [compile]`.

`kernels`: the alignment kernel in Triton, forward and backward, beside the usual code on autograd and the matrix
product of all slices alone. Errors are those of log K (absolute) and of its gradient (over the largest gradient)
against the usual code in float64 on the same features.
`train`: VladVA's step on LLaVA-1.5-7B (examples/vladva/llava_1.5_7b_8gpu.yaml), and two passes in its place: the
contrastive loss on the images alone, then the next-token loss on the images with captions.
`sugar`: a step with the structure loss (examples/sugar/llava_1.5_7b.yaml), with random features of the slices in place
of the teachers'.
`embed`: `embed_sequences`. `generate`: the model's and its backbone's `generate`.
`compile`: a step of a smaller model whose language model is trained whole, with and without `torch_compile`.

All models have random weights. A step is what `UniGDTrainer.train` does from `on_step_begin` to `on_step_end`: both
passes, clipping and the optimizer. Times are medians after the warm-up. `peak_bytes` is the peak of torch's allocator,
and `held_bytes` is what it held before.

`model_flops` counts what a joint step needs, without padding and without what is computed again. In a decoder of P
weights in L layers of width h, a forward pass of S tokens takes 2 P S + 2 S^2 h L (causal attention), and 2 V h per
labelled token for the logits. The backward pass takes as much, because the frozen weights need no gradient; LoRA's own
products are left out. The tower takes one forward pass per image. `mfu` is the share of the GPU's dense bfloat16 peak.
`hfu` also counts the decoder's passes that gradient checkpointing and the gradient cache repeat.

A part that fails is recorded with its error, and the next one runs. After each part, the script writes gpu-*.json to
benchmarks/results or to `--output`. `--tiny` checks the script with tiny models and without a GPU.
"""

import argparse
import gc
import importlib.util
import json
import os
import platform
import sys
import time
import traceback
import warnings
from importlib.metadata import version
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent / "gpu_parts"))

import torch
import transformers
from inference import embed, generate
from kernel import kernels
from models import SHAPES, TINY
from training import compile_, sugar, train


RESULTS = Path(__file__).parent / "results"
BENCHMARKS = {
    "kernels": kernels,
    "train": train,
    "sugar": sugar,
    "embed": embed,
    "generate": generate,
    "compile": compile_,
}


def hardware() -> dict:
    gpu = {"gpu": None}
    if SHAPES["device"] == "cuda":
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "gpu_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    packages = ("transformers", "triton", "accelerate", "peft", "trl", "datasets")
    return {
        **gpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in packages if importlib.util.find_spec(name)},
    }


def run_part(part) -> dict:
    try:
        return part()
    except Exception as error:  # the next part may succeed
        frames = [str(frame).strip() for frame in traceback.format_tb(error.__traceback__)[-4:]]
        return {"error": f"{type(error).__name__}: {str(error)[:1000]}", "traceback": frames}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--tiny", action="store_true", help="check the script without a GPU, with tiny models")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(BENCHMARKS):
        parser.error(f"unknown names {sorted(unknown)}")
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("no CUDA GPU was found; `--tiny` checks the script without one")
    if arguments.tiny:
        SHAPES.update(TINY)
    torch.set_num_threads(1)  # as in a worker of a data loader
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    arguments.output.mkdir(parents=True, exist_ok=True)
    machine = hardware()
    print(json.dumps(machine), flush=True)
    for name in arguments.names or BENCHMARKS:
        command = f"python benchmarks/gpu.py {name}" + (" --tiny" if arguments.tiny else "")
        results = {}
        for title, part in BENCHMARKS[name]().items():
            start = time.perf_counter()
            results[title] = run_part(part)
            print(f"{name}, {title} ({time.perf_counter() - start:.1f} s): {json.dumps(results[title])}", flush=True)
            text = json.dumps({"command": command, **machine, "results": results}, indent=1)
            (arguments.output / f"gpu-{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()

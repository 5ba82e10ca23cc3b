"""Measures the effect of the structure loss on last-image retrieval with the data of the Sugar quickstart.

    python benchmarks/stories.py --seeds 0 1 2 --output benchmarks/results/stories.json

For each seed, every arm trains the same model on the same rows in the same order. The arms are the comparison that the
paper lacks (alignment_weight 1 or 0), the two normalisations of the kernel, and the ablations of the paper's table 4b.
"""

import argparse
import copy
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from hf_unigd import UniGDProcessor
from hf_unigd.quickstart.arguments import QuickstartArguments
from hf_unigd.quickstart.sugar import make_trainer, measure, prepare


ARMS: dict[str, dict] = {
    "without structure loss": {"alignment_weight": 0.0},
    "content": {"alignment_weight": 1.0},
    "cosine": {"alignment_weight": 1.0, "alignment_normalization": "cosine"},
    "content, delta 0.5": {"alignment_weight": 1.0, "alignment_bandwidth": 0.5},
    "content, delta 0.3": {"alignment_weight": 1.0, "alignment_bandwidth": 0.3},
    "mean slice similarity (w/o GAK)": {"alignment_weight": 1.0, "alignment_target": "mean_slice"},
    "CLIP only (w/o TK)": {"alignment_weight": 1.0, "triple_kernel": False},
    "last token (w/o AvgPool)": {"alignment_weight": 1.0, "image_pooling": "last"},
    "one-slice pairs by kernel": {"alignment_weight": 1.0, "alignment_one_slice": "kernel"},
    "differentiable form": {"alignment_weight": 1.0, "alignment_similarity": "kernel"},
}


def run_seed(seed: int, arms: list[str], max_steps: int | None) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        args = QuickstartArguments(recipe="sugar", output=folder, max_steps=max_steps, seed=seed)
        train, test, teachers, model, processor = prepare(args)
        results = {}
        for arm in arms:
            objective = dict(ARMS[arm])
            pooling = objective.pop("image_pooling", "mean")
            arm_processor = UniGDProcessor(
                processor.vlm_processor, embedding_position="last_slice", image_pooling=pooling
            )
            trainer = make_trainer(copy.deepcopy(model), arm_processor, train, test, teachers, args, **objective)
            trainer.train()
            results[arm] = measure(trainer, test)
            print(f"seed {seed}, {arm}: {results[arm]}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--max_steps", type=int, default=None, help="number of steps; defaults to the quickstart's")
    parser.add_argument("--output", default=None, help="JSON file to write")
    args = parser.parse_args()
    start = time.time()
    by_seed = {seed: run_seed(seed, args.arms, args.max_steps) for seed in args.seeds}
    names = list(by_seed[args.seeds[0]][args.arms[0]])
    print(
        f"\n{'mean over seeds ' + str(args.seeds):<34}"
        + "".join(f"{name.replace('_recall_at_', ' R@'):>14}" for name in names)
    )
    for arm in args.arms:
        means = [statistics.mean(by_seed[seed][arm][name] for seed in args.seeds) for name in names]
        print(f"{arm:<34}" + "".join(f"{value:>14.4f}" for value in means))
    if args.output:
        record = {
            "command": "python " + shlex.join(sys.argv),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "minutes": round((time.time() - start) / 60, 1),
            "results": by_seed,
        }
        Path(args.output).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Measures whether a round of mined hard negatives raises recall: `python benchmarks/mining.py --seeds 0 1 2`.

For each seed, the quickstart's model is trained on icons for `--base_steps`. Its captions are indexed, negatives are
mined for the same rows, and the training goes on for `--steps` from the same weights in every arm: without negatives,
and with those of each setting. All arms see the same rows in the same order. A step with negatives costs more, so
`seconds` stands beside the recall.

The script writes benchmarks/results/mining-SEED.json after each arm, and goes on where it was stopped.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset

from hf_unigd.data import load_icons
from hf_unigd.data.sources import load_rows
from hf_unigd.quickstart.arguments import QuickstartArguments
from hf_unigd.quickstart.muon import MuonWithAdamW
from hf_unigd.quickstart.small_llava import IMAGE_SIZE
from hf_unigd.quickstart.training import make_trainer
from hf_unigd.quickstart.vladva import build, measure
from hf_unigd.retrieval import build_index, mine_negatives


RESULTS = Path(__file__).parent / "results"
VIEWS = 1
DIRECTIONS = ("anchor_to_positive", "positive_to_anchor")
ARMS: dict[str, dict | None] = {
    "without negatives": None,
    "closest": {},
    "relative margin 0.05": {"relative_margin": 0.05},
    "after the 10 closest": {"range_min": 10},
    "random of the 30 closest": {"range_max": 30, "sampling_strategy": "random"},
}


def train(model, processor, rows, test, seed, output: str, steps: int, **rates) -> tuple[dict[str, float], float]:
    trainer = make_trainer(
        QuickstartArguments(output=output, max_steps=steps, seed=seed),
        model,
        processor,
        rows,
        test,
        MuonWithAdamW(model, **rates),
        per_device_eval_batch_size=250,
        causal_lm_weight=0.5,
        logging_steps=50,
        disable_tqdm=True,
    )
    start = time.perf_counter()
    trainer.train()
    return measure(trainer), time.perf_counter() - start


def run_seed(args, seed: int, folder: str) -> None:
    """Runs the arms that have no result yet."""
    done = read(seed)
    rows = load_icons("train", views=VIEWS, size=IMAGE_SIZE, seed=seed)
    rows = Dataset.from_list(list(rows)).remove_columns("icon")
    test = load_icons("test", size=IMAGE_SIZE)
    icons = load_icons("train", views=12, size=IMAGE_SIZE, seed=seed)
    model, processor = build(icons, seed)
    base, seconds = train(model, processor, icons, test, seed, f"{folder}/base", args.base_steps)
    done["base"] = base | {"seconds": seconds}
    captions = Dataset.from_dict({"anchor": sorted(set(rows["short_caption"]))})
    index = build_index(model, processor, captions, f"{folder}/index", source="captions", show_progress=False)
    for arm in args.arms:
        if arm in done:
            continue
        settings, mined, report = ARMS[arm], rows, None
        if settings is not None:
            output = f"{folder}/{arm.replace(' ', '-')}"
            report = mine_negatives(
                model, processor, index, rows, output, num_negatives=args.num_negatives, seed=seed,
                trust_caption_columns=True, show_progress=False, **settings,
            )  # fmt: skip
            mined = load_rows(output)
        arm_model = copy.deepcopy(model)
        # The base has learned the pairs: a third of its learning rates.
        rates = {"matrix_lr": 1.3e-3, "lr": 7e-4}
        found, seconds = train(arm_model, processor, mined, test, seed, f"{folder}/run", args.steps, **rates)
        done[arm] = found | {"seconds": seconds, "rows": len(mined)}
        print(f"seed {seed}, {arm}: {done[arm]} {report or ''}", flush=True)
        write(args, seed, done)


def write(args, seed: int, done: dict) -> None:
    result = {
        "command": f"python benchmarks/mining.py --seeds {seed} --base_steps {args.base_steps} --steps {args.steps} "
        f"--num_negatives {args.num_negatives}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "lancedb")},
        "results": done,
    }
    (RESULTS / f"mining-{seed}.json").write_text(json.dumps(result, indent=1) + "\n")


def read(seed: int) -> dict:
    file = RESULTS / f"mining-{seed}.json"
    return json.loads(file.read_text())["results"] if file.exists() else {}


def show(seeds: list[int]) -> None:
    print(f"\n{'R@1, image to text / text to image':<36}" + "".join(f"{f'seed {seed}':>16}" for seed in seeds))
    results = [read(seed) for seed in seeds]
    for arm in ("base", *ARMS):
        found = [each[arm] for each in results if arm in each]
        if found:
            pairs = [[each[f"{name}_recall_at_1"] for name in DIRECTIONS] for each in found]
            cells = "".join(f"{f'{a:.1%} / {b:.1%}':>16}" for a, b in pairs)
            print(f"{arm:<36}{cells}   mean {statistics.mean(map(statistics.mean, pairs)):.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--base_steps", type=int, default=250)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--num_negatives", type=int, default=1)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    args = parser.parse_args()
    for seed in args.seeds:
        if not set(args.arms) <= set(read(seed)):
            with tempfile.TemporaryDirectory() as folder:
                run_seed(args, seed, folder)
    show(args.seeds)


if __name__ == "__main__":
    main()

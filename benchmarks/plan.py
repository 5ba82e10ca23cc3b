"""Compares the estimates of `hf-unigd plan` with measured steps, and prints the tables of docs/planning.md:
`python benchmarks/plan.py [on_h100] [here] [table]`.

The steps on an H100 are those of benchmarks/results/gpu-train.json and gpu-sugar.json, and one is measured here: the
small LLaVA of benchmarks/training.py, whole in float32, on two threads. The script writes
benchmarks/results/plan.json.
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from training import RESULTS, make_processor, make_step, make_trainer, make_vlm, peak, versions
from transformers import LlavaConfig, Qwen3VLConfig

from hf_unigd.cli.plan import Planned, plan_recipe
from hf_unigd.trainer.plan import CARDS, Estimate, estimate


EXAMPLES = Path(__file__).parents[1] / "examples"
REPEATS = 3
EPOCH = 8_100_000  # rows of VladVA's data
CLIP = {
    "model_type": "clip_vision_model",
    "image_size": 336,
    "patch_size": 14,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}


def llava(width: int, inner: int, layers: int, heads: int) -> LlavaConfig:
    text = {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }
    return LlavaConfig(vision_config=CLIP, text_config=text, image_seq_length=576, dtype="bfloat16")


# The published shapes.
MODELS = {
    "Qwen3-VL-2B": Qwen3VLConfig(
        text_config={
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        tie_word_embeddings=True,
        dtype="bfloat16",
    ),
    "LLaVA-1.5-7B": llava(4096, 11008, 32, 32),
    "LLaVA-1.5-13B": llava(5120, 13824, 40, 40),
}


def planned(model: str, recipe: str | None = None, **arguments) -> Planned:
    """The plan of a model of `MODELS`, or of the small one."""
    config = [] if recipe is None else ["--config", str(EXAMPLES / recipe)]
    with tempfile.TemporaryDirectory() as folder:
        (MODELS[model] if model in MODELS else make_vlm(make_processor()).config).save_pretrained(folder)
        arguments = {"model_name_or_path": folder, "output_dir": folder, **arguments}
        words = [word for name, value in arguments.items() for word in (f"--{name}", *str(value).split())]
        return plan_recipe([*config, *words])


def compared(found: Estimate, seconds: float, measured: float, estimated: float) -> dict:
    return {
        "estimated_seconds": found.seconds,
        "measured_seconds": seconds,
        "seconds_ratio": found.seconds / seconds,
        "estimated_bytes": estimated,
        "measured_bytes": measured,
        "bytes_ratio": estimated / measured,
    }


def on_h100() -> dict:
    """The steps of benchmarks/gpu.py, whose rows have captions of 12 and 120 words, a token or little more each."""
    common = {"dataset_name": "d", "dtype": "bfloat16", "use_peft": True, "bf16": True, "gradient_checkpointing": True}
    results = {}
    plan = planned(
        "LLaVA-1.5-7B", **common, lora_r=16, soft_prompts=True, prompt_tokens=26, short_tokens=12, long_tokens=120
    )
    for name, result in json.loads((RESULTS / "gpu-train.json").read_text())["results"].items():
        rows, *chunk = (int(word) for word in re.findall(r"\d+", name))
        if "two passes" in name:
            continue
        work = replace(plan.work, rows=rows, chunk=chunk[0] if chunk else None)
        found = estimate(plan.shapes, work, plan.args, plan.card, plan.plan.utilization)
        results[name] = compared(found, result["seconds"], result["peak_bytes"], found.peak)
        done = result["model_flops"] * result["hfu"] / result["mfu"]
        results[name]["flops_ratio"] = found.flops / done  # of those that benchmarks/gpu.py counts by itself
    ((name, result),) = json.loads((RESULTS / "gpu-sugar.json").read_text())["results"].items()
    plan = planned(
        "LLaVA-1.5-7B",
        **common,
        lora_r=128,
        lora_target_modules="q_proj v_proj",
        head_type="mlp",
        embedding_dim=1024,
        embedding_position="last_slice",
        contrastive_weight=0,
        alignment_weight=1,
        images=4,
        per_device_train_batch_size=16,
        prompt_tokens=result["tokens"] // 16 - 4 * 576 - 60,
        long_tokens=60,
    )
    results[f"Sugar, {name}"] = compared(plan.found, result["seconds"], result["peak_bytes"], plan.found.peak)
    return results


def here() -> dict:
    """A step of the small LLaVA: its forward and backward pass, without the optimizer."""
    torch.set_num_threads(2)
    trainer, batch = make_trainer(16)
    step = make_step(trainer, batch)
    step()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    highest = peak(step)
    anchors, candidates = (chunk["attention_mask"].numel() / 16 for chunk in batch["chunks"])  # padding runs too
    labelled = sum(int(chunk["labels"].ne(-100).sum()) for chunk in batch["chunks"]) / 16
    found = planned(
        "small",
        dataset_name="d",
        dtype="float32",
        per_device_train_batch_size=16,
        # All that is not generated counts as the image, which the language model sees no difference in.
        image_tokens=round(anchors - labelled),
        prompt_tokens=0,
        short_tokens=round(candidates),
        long_tokens=round(labelled),
        card="cpu",
    )
    # What the measurement counts: all that a step takes beside the weights, but no state of the optimizer.
    memory = found.found.memory
    estimated = found.found.peak - memory["weights"] - memory["optimizer"]
    result = compared(found.found, statistics.median(seconds), highest, estimated)
    return {**result, "measured_share_of_peak": result["seconds_ratio"] * found.plan.utilization}


def table() -> list[dict]:
    """The recipes for 8 GPUs, and an epoch of 8.1 million rows, on one card and on eight."""
    rows = []
    for name in MODELS:
        recipe = "vladva/qwen3_vl_2b_8gpu.yaml" if name == "Qwen3-VL-2B" else "vladva/llava_1.5_7b_8gpu.yaml"
        plan = planned(name, recipe)
        for card in ("A100-80GB", "H100-80GB"):
            for devices in (1, 8):
                found = estimate(
                    plan.shapes, plan.work, plan.args, CARDS[card], plan.plan.utilization, devices=devices
                )
                batch = plan.work.rows * devices
                rows.append(
                    {
                        "model": name,
                        "cards": f"{devices} x {card}",
                        "memory_gb": found.peak / 1e9,
                        "fits": found.fits(CARDS[card]),
                        "rows": batch,
                        "seconds": found.seconds,
                        "days": EPOCH / batch * found.seconds / 86400,
                    }
                )
    return rows


PARTS = {"on_h100": on_h100, "here": here, "table": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    names = parser.parse_args().parts
    transformers.logging.set_verbosity_error()
    for name in names:
        found = PARTS[name]()
        file = RESULTS / "plan.json"
        results = json.loads(file.read_text())["results"] if file.exists() else {}
        result = {"command": "python benchmarks/plan.py", **versions(), "results": {**results, name: found}}
        file.write_text(json.dumps(result, indent=1) + "\n")
        for row in found if name == "table" else []:
            cells = [row["model"], row["cards"], f"{row['memory_gb']:.0f} GB", f"{row['rows']:,}"]
            print("|", " | ".join([*cells, f"{row['seconds']:.1f} s", f"{row['days']:.1f}"]), "|")
        for case, each in {"on_h100": found, "here": {"here": found}}.get(name, {}).items():
            print(f"{case}: time {each['seconds_ratio']:.2f}, memory {each['bytes_ratio']:.2f} of the measured")


if __name__ == "__main__":
    main()

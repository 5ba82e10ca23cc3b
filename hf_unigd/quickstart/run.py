"""Build, measure, train, measure again, and show what came out."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from ..data import load_icons
from ..data.icons import HELD_OUT
from ..evaluation import rank_candidates
from ..evaluation.figures import draw_retrieval
from ..hub import make_model_card
from ..hub.cards import RETRIEVAL_NAME
from ..modeling import UniGDForConditionalGeneration, UniGDProcessor
from ..retrieval import embed_sequences
from ..trainer import UniGDTrainer, UniGDTrainingArguments
from .small_llava import build_llava, build_processor


IMAGE_SIZE, PATCH_SIZE = 48, 12
VIEWS = 12
SHOWN_QUERIES, SHOWN_RESULTS = 8, 5

# What a user runs: no hf-unigd, only transformers and the checkpoint.
FRESH_PROCESS = """
import json, sys
sys.modules["hf_unigd"] = None  # importing it would raise
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, picture, text = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
image, caption = model.embed(**processor.process_sequences([[Image.open(picture)], text]))
print(json.dumps(float(image @ caption)))
"""


# What arguments that are not given become, by recipe.
DEFAULTS = {
    "vladva": {"output": "runs/quickstart", "max_steps": 650, "batch_size": 128},
    "sugar": {"output": "runs/quickstart-sugar", "max_steps": 600, "batch_size": 32},
}


@dataclass
class QuickstartArguments:
    recipe: str = field(default="vladva", metadata={"help": "What to train.", "choices": list(DEFAULTS)})
    output: str = field(default="", metadata={"help": "Folder to write: runs/quickstart or runs/quickstart-sugar."})
    max_steps: int = field(default=0, metadata={"help": "Training steps: 650, or 600 for Sugar."})
    batch_size: int = field(default=0, metadata={"help": "Rows a step: 128, or 32 for Sugar."})
    seed: int = field(default=0, metadata={"help": "Of the weights and the order of the rows."})

    def __post_init__(self):
        for name, value in DEFAULTS[self.recipe].items():
            setattr(self, name, getattr(self, name) or value)


def run(args: QuickstartArguments) -> dict[str, dict[str, float]]:
    """
    Trains a small LLaVA on icons with the VladVA objective and writes to `args.output`: the checkpoint with its card,
    `metrics.json` and `retrieval.png`.

    Returns:
        Metrics by name of the stage: `before`, `after` and `chance`.

    Raises:
        RuntimeError: the checkpoint does not give the same similarity in a fresh process.
    """
    start = time.perf_counter()
    output = Path(args.output)
    train, test = (
        load_icons("train", views=VIEWS, size=IMAGE_SIZE, seed=args.seed),
        load_icons("test", size=IMAGE_SIZE),
    )
    model, processor = build(train, args.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"A LLaVA of {parameters / 1e6:.1f} million parameters.")
    print(f"{len(train)} pictures of {len(train) // VIEWS} icons to train on, {len(test)} others to test.")

    training_args = UniGDTrainingArguments(
        output_dir=str(output),
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=250,
        causal_lm_weight=0.5,
        learning_rate=2e-3,
        warmup_steps=20,
        weight_decay=0.05,
        adam_beta2=0.98,
        freeze_vision_tower=False,  # it starts from nothing, like the rest
        check_rows=False,  # they are drawn, not read
        dataloader_pin_memory=torch.accelerator.is_available(),
        seed=args.seed,
        save_strategy="no",
        logging_steps=25,
        report_to=[],
    )
    trainer = UniGDTrainer(model, training_args, train_dataset=train, eval_dataset=test, processing_class=processor)
    before = measure(trainer)
    trainer.train()
    after = measure(trainer)
    chance = {
        f"{way}_recall_at_{k}": k / HELD_OUT
        for way in ("anchor_to_positive", "positive_to_anchor")
        for k in (1, 5, 10)
    }
    metrics = {"before": before, "after": after, "chance": chance}
    minutes = (time.perf_counter() - start) / 60

    trainer.save_model()
    draw_results(model, processor, test, output / RETRIEVAL_NAME)
    write_card(
        output,
        after,
        args,
        minutes,
        summary="a small LLaVA built in code, trained from nothing on drawn icons by `hf-unigd quickstart`.",
        dataset="Material Design icons, held out",
        objective="InfoNCE + next-token, 1 : 0.5 (VladVA)",
    )
    show_metrics(metrics)
    show_captions(model, processor, test)
    check_in_fresh_process(model, processor, test, output)

    minutes = (time.perf_counter() - start) / 60
    (output / "metrics.json").write_text(json.dumps({**metrics, "minutes": round(minutes, 2)}, indent=2) + "\n")
    print(f"\n{minutes:.1f} minutes. In {output}: the checkpoint, retrieval.png, metrics.json, README.md (its card).")
    return metrics


def build(train, seed: int) -> tuple[UniGDForConditionalGeneration, UniGDProcessor]:
    """An untrained model, and a processor whose tokenizer has seen the training captions."""
    captions = [
        train[place][column] for place in range(len(train) // VIEWS) for column in ("short_caption", "long_caption")
    ]
    prompts = [
        "Summarize the provided image in one word",
        "Summarize the provided text in one word",
        "USER: ASSISTANT:",
    ]
    processor = UniGDProcessor(build_processor(captions + prompts * 100, IMAGE_SIZE, PATCH_SIZE))
    return UniGDForConditionalGeneration.from_vlm(build_llava(processor.vlm_processor, seed=seed)), processor


def measure(trainer: UniGDTrainer) -> dict[str, float]:
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    return {name: value for name, value in metrics.items() if "recall" in name or name == "perplexity"}


def show_metrics(metrics: dict[str, dict[str, float]]) -> None:
    print(f"\n{'on icons never trained on':<28}{'before':>10}{'after':>10}{'chance':>10}")
    for way, title in (("anchor_to_positive", "image to text"), ("positive_to_anchor", "text to image")):
        for k in (1, 5, 10):
            row = [metrics[stage][f"{way}_recall_at_{k}"] for stage in ("before", "after", "chance")]
            print(f"{f'{title}, R@{k}':<28}" + "".join(f"{value:>10.1%}" for value in row))
    before, after = metrics["before"]["perplexity"], metrics["after"]["perplexity"]
    print(f"{'perplexity of captions':<28}{before:>10.1f}{after:>10.1f}")


def spread(test, count: int) -> list[int]:
    """Places of `count` rows that share no words: the icons come in the order of their names."""
    return list(range(0, len(test), len(test) // count))[:count]


def show_captions(model, processor, test, count: int = 3) -> None:
    rows = [test[place] for place in spread(test, count)]
    batch = processor.process_sequences([[row["image"]] for row in rows], padding_side="left")
    generated = model.generate(**batch, max_new_tokens=60, do_sample=False)
    answers = processor.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    print("\nGenerated captions:")
    for row, answer in zip(rows, answers, strict=True):
        print(f"  {row['long_caption']}\n    -> {answer.strip()}")


def draw_results(model, processor, test, file: Path) -> None:
    """Text queries and their nearest pictures among all held-out ones."""
    images = embed_sequences(model, processor, [[test[place]["image"]] for place in range(len(test))], batch_size=250)
    places = spread(test, SHOWN_QUERIES)
    queries = [test[place]["short_caption"] for place in places]
    ranking = rank_candidates(embed_sequences(model, processor, queries, show_progress=False), images, SHOWN_RESULTS)
    draw_retrieval(
        [
            (query, [(test[hit]["image"], test[hit]["short_caption"], hit == place) for hit in hits])
            for place, query, hits in zip(places, queries, ranking.tolist(), strict=True)
        ],
        file,
    )


@torch.no_grad()
def check_in_fresh_process(model, processor, test, output: Path) -> None:
    row = test[0]
    picture: Image.Image = row["image"]
    picture.save(output / "query.png")
    image, caption = model.embed(**processor.process_sequences([[picture], row["short_caption"]]))
    result = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(output), str(output / "query.png"), row["short_caption"]],
        capture_output=True,
        text=True,
    )
    (output / "query.png").unlink()
    if result.returncode != 0:
        raise RuntimeError(f"The checkpoint does not load in a fresh process:\n{result.stderr}")
    fresh, expected = json.loads(result.stdout.splitlines()[-1]), float(image @ caption)
    if abs(fresh - expected) > 1e-4:
        raise RuntimeError(f"A fresh process finds a similarity of {fresh}, this one {expected}.")
    print(f"\nReloaded in a fresh process without hf-unigd: the same similarity, {fresh:.4f}.")


def write_card(
    output: Path,
    metrics: dict[str, float],
    args: QuickstartArguments,
    minutes: float,
    summary: str,
    dataset: str,
    objective: str,
    method: str = "vladva",
) -> None:
    card = make_model_card(
        repo_id=str(output),
        title=output.name,
        summary=summary,
        dataset=dataset,
        metrics=metrics,
        training={
            "objective": objective,
            "steps": args.max_steps,
            "batch size": args.batch_size,
            "hardware": f"{torch.get_num_threads()} CPU threads",
            "minutes": f"{minutes:.1f}",
        },
        limits="It knows nothing but icons: it shows that the whole line works, and is no use beyond that.",
        license="apache-2.0",
        methods=[method],
        retrieval_picture=RETRIEVAL_NAME if (output / RETRIEVAL_NAME).is_file() else None,
    )
    card.save(output / "README.md")

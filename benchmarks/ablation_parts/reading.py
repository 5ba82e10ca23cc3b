"""Descriptions of pictures behind captions of an index: rows to learn them from, and how many are right (Sugar, table
4a)."""

import random
from statistics import fmean
from tempfile import TemporaryDirectory

from datasets import Dataset
from torch.utils import data

from hf_unigd.evaluation.embedders import ModelEmbedder
from hf_unigd.retrieval import answer_with_retrieval, build_index
from hf_unigd.retrieval.answering import make_prompt
from hf_unigd.retrieval.entries import Hit

from .captions import BATCH_SIZE, LONGEST, generate_captions, judge_scene
from .corpus import QUESTIONS, Row, WithoutImages, scenes


ENTRIES, ASKED = 3, 200
QUESTION = QUESTIONS["description"][0]


class BehindEntries(data.Dataset):
    """
    Scenes to describe behind the short captions of three, of which one is their own, in the prompt of
    [`answer_with_retrieval`]. The base model was trained on no such prompt.

    Args:
        rows: Scenes.
    """

    def __init__(self, rows: Dataset):
        self.rows, self.captions = rows, list(WithoutImages(rows)["short_caption"])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Row:
        row, draw = self.rows[place], random.Random(place)
        captions = [row["short_caption"], *draw.sample(self.captions, ENTRIES - 1)]
        draw.shuffle(captions)
        text, image, question = make_prompt(
            [row["image"], QUESTION], [Hit(0.0, str(number), 0, [], [each]) for number, each in enumerate(captions)]
        )
        parts = [{"type": "text", "text": text}, {"type": "image", "image": image}, {"type": "text", "text": question}]
        answer = {"role": "assistant", "content": row["long_caption"]}
        return {"messages": [{"role": "user", "content": parts}, answer]}


def description_accuracy(embedder: ModelEmbedder, rows: Dataset | None = None) -> dict[str, float]:
    """
    The shares of scenes whose description is right in kinds, colours and place: `described_alone`, and
    `described_with_retrieval`, behind the captions that the embeddings find for the picture and the question.

    Args:
        embedder: The model, which makes the index of all captions too.
        rows: Scenes; by default, the held-out ones. The first of them are described.
    """
    rows = scenes("test") if rows is None else rows
    model, processor = embedder.model, embedder.processor
    asked = rows.select(range(min(ASKED, len(rows))))[:]
    entries = [{"messages": [{"role": "user", "content": each}]} for each in WithoutImages(rows)["short_caption"]]
    said: dict[str, list[str]] = {"alone": generate_captions(model, processor, asked["image"], QUESTION)}
    said["with_retrieval"] = []
    with TemporaryDirectory() as folder:
        index = build_index(model, processor, Dataset.from_list(entries), folder, show_progress=False)
        for start in range(0, len(asked["image"]), BATCH_SIZE):
            questions = [[image, QUESTION] for image in asked["image"][start : start + BATCH_SIZE]]
            answers = answer_with_retrieval(
                model, processor, index, questions, ENTRIES, max_new_tokens=LONGEST, do_sample=False
            )
            said["with_retrieval"] += [answer.text for answer in answers]
    return {
        f"described_{way}": fmean(judge_scene(*each)["all"] for each in zip(texts, asked["long_caption"], strict=True))
        for way, texts in said.items()
    }

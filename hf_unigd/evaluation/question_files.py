"""Readers of the files of VizWiz, FVQA and WebQA. Each returns rows with the columns that the docstring names."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .answer_measures import yes_or_no
from .fetched import Read, read_json


def read_vizwiz(folder: Path | None, name: str, images: str | None, file: str) -> Read:
    """VizWiz: `image`, `text`, the `answers` of ten people, and the most frequent of them as `answer`."""
    rows = []
    for record in read_json(folder, name, file):
        answers = [each["answer"] for each in record["answers"]]
        (answer, _), *_ = Counter(answers).most_common(1)
        rows.append({"image": record["image"], "text": record["question"], "answers": answers, "answer": answer})
    return [(rows, {})], {"files": [file]}, {}


def read_fvqa(folder: Path | None, name: str, images: str | None, file: str, answer_source: str) -> Read:
    """FVQA's questions whose answer is in the picture (`answer_source="image"`) or in the facts (`"kb"`): `image`,
    `text`, and the `answers`, of which there is one."""
    records = list(read_json(folder, name, file).values())
    rows = [
        {"image": record["img_file"], "text": record["question"], "answers": [record["answer"]]}
        for record in records
        if record["ans_source"].lower() == answer_source
    ]
    if not rows:
        found = ", ".join(sorted({record["ans_source"] for record in records}))
        raise ValueError(f"{file} has no question with the `ans_source` {answer_source!r}, only {found}")
    description = {"files": [file], "answer_source": answer_source}
    return [(rows, {})], description, {"left_out": len(records) - len(rows)}


def read_fvqa_facts(folder: Path | None, name: str, images: str | None, file: str) -> Read:
    """FVQA's facts as sentences (`text`), each once."""
    surfaces = [fact["surface"] for fact in read_json(folder, name, file).values()]
    texts = dict.fromkeys(surface.replace("[[", "").replace("]]", "").strip() for surface in surfaces)
    return [([{"text": text} for text in texts if text], {})], {"files": [file]}, {}


def read_webqa(
    folder: Path | None, name: str, images: str | None, file: str, split: str, sample: int | None = None
) -> Read:
    """WebQA's questions about pictures: `text` and `answers`."""
    records, description = _webqa(folder, name, file, split)
    records, description = _sampled(records, sample), {**description, "sample": sample}
    rows = [
        {"text": _unquoted(record["Q"]), "answers": [_unquoted(each) for each in record["A"]]} for record in records
    ]
    return [(rows, {})], description, {}


def read_webqa_sources(
    folder: Path | None, name: str, images: str | None, file: str, split: str, sample: int | None = None
) -> Read:
    """The pictures that WebQA gives for the questions that [`read_webqa`] reads, those that help and those that do
    not: `image` (an id) and `text` (a caption), each picture once."""
    records, description = _webqa(folder, name, file, split)
    facts = {
        fact["image_id"]: {"image": fact["image_id"], "text": fact["caption"]}
        for record in _sampled(records, sample)
        for fact in (*record["img_posFacts"], *record["img_negFacts"])
    }
    return [(list(facts.values()), {})], {**description, "sample": sample}, {}


def read_webqa_positions(
    folder: Path | None,
    name: str,
    images: str | None,
    file: str,
    split: str,
    sample: int,
    pairs: int,
    folder_name: str,
) -> Read:
    """
    WebQA's yes/no questions about one picture, with `pairs` pictures in all: `text`, `answer` (yes or no), `images`
    (ids) and `captions`, those that the question is about first. Questions with fewer pictures, or with an answer that
    says neither, are left out and counted.
    """
    records, description = _webqa(folder, folder_name, file, split)
    rows = []
    asked = [record for record in records if record["Qcate"] == "YesNo"]
    for record in asked:
        facts = [*record["img_posFacts"], *record["img_negFacts"][: pairs - 1]]
        answer = yes_or_no(record["A"][0])
        if len(record["img_posFacts"]) == 1 and len(facts) == pairs and answer is not None:
            rows.append(
                {
                    "text": _unquoted(record["Q"]),
                    "answer": answer,
                    "images": [fact["image_id"] for fact in facts],
                    "captions": [fact["caption"] for fact in facts],
                }
            )
    left_out = len(asked) - len(rows)
    if not rows:
        raise ValueError(
            f"{file} has no yes/no question of the split {split!r} with {pairs} pictures, one of them right"
        )
    return [(_sampled(rows, sample), {})], {**description, "sample": sample, "pairs": pairs}, {"left_out": left_out}


def _webqa(folder: Path | None, name: str, file: str, split: str) -> tuple[list[Mapping[str, Any]], dict[str, Any]]:
    """The questions of a split that pictures answer, and what was read."""
    records = list(read_json(folder, name, file).values())
    found = [record for record in records if record["split"] == split and record["img_posFacts"]]
    if not found:
        raise ValueError(f"{file} has no question about pictures in the split {split!r}")
    return found, {"files": [file], "split": split}


def _sampled(records: Sequence[Any], count: int | None) -> list[Any]:
    """A random sample, drawn by a seed; all if there are not more."""
    if count is None or count >= len(records):
        return list(records)
    places = sorted(random.Random(0).sample(range(len(records)), count))
    return [records[place] for place in places]


def _unquoted(text: str) -> str:
    """WebQA's questions and answers stand in quotation marks."""
    return text.strip().removeprefix('"').removesuffix('"').strip()

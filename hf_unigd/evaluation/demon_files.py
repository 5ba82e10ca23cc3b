"""Reads the files of DEMON."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .answer_measures import plain
from .fetched import Read, read_json


_PICTURE = re.compile(r"\{(?:image|table)#(\d+)\}")


def read_demon(folder: Path | None, name: str, images: str | None, tasks: Sequence[str]) -> Read:
    """
    DEMON's questions: `parts` (texts, and places in `images`), `images` (paths), `choices` with the number of the
    right one as `answer`, or None for both; `answers`, of which there is one; and the task as `category`.

    Raises:
        FileNotFoundError: the file of a task is missing.
        ValueError: a question has no choices, an answer that is none of them, or pictures that are not there.
    """
    rows = []
    for task in tasks:
        content = read_json(folder, name, f"{task}/core/core.json")
        for sample in content["data"]:
            try:
                rows.append(_row(task, sample, content["metadata"]))
            except ValueError as error:
                raise ValueError(f"sample {sample['sample_id']} of {task} {error}") from error
    return [(rows, {})], {"tasks": list(tasks)}, {}


def _row(task: str, sample: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    instance, response = sample["task_instance"], str(sample["response"])
    text = f"{metadata['task_instruction'][sample['task_instruction_id']]} {instance['context']}"
    choices, answer = None, None
    if metadata["question_type"] == "multi-choice":
        choices, text = _choices(instance, text)
        same = [plain(choice) == plain(response) for choice in choices]
        if not any(same):
            raise ValueError(f"has the answer {response!r}, which is none of its choices: {', '.join(choices)}")
        answer = same.index(True)
    return {
        "parts": _parts(text, len(instance["images_path"])),
        "images": [f"{task}/core/images/{path}" for path in instance["images_path"]],
        "choices": choices,
        "answer": answer,
        "answers": [response],
        "category": task,
    }


def _choices(instance: Mapping[str, Any], text: str) -> tuple[list[str], str]:
    """The choices of a question, and its text with them. Where they are pictures, the text names them already."""
    if "choice_list" in instance:
        listed = [str(choice) for choice in instance["choice_list"]]
        text += " Choice list:['" + "', '".join(listed) + "']. Your answer is:"
        return [_PICTURE.sub("", choice).strip(" :") for choice in listed], text
    choices = list(dict.fromkeys(re.findall(r"\bImage [A-Z]\b", text)))
    if not choices:
        raise ValueError("has no `choice_list`, and no choices such as 'Image A' in its text")
    return choices, text


def _parts(text: str, count: int) -> list[str | int]:
    """A text in pieces, with the numbers of the pictures that it names between them."""
    pieces = _PICTURE.split(text)
    parts: list[str | int] = []
    for place, piece in enumerate(pieces):
        if place % 2 == 0:
            parts += [piece.strip()] if piece.strip() else []
        elif 1 <= int(piece) <= count:
            parts.append(int(piece) - 1)
        else:
            raise ValueError(f"names picture {piece} of {count}")
    return parts

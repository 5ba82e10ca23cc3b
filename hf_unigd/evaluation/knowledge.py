"""The index of what a benchmark lets a model retrieve."""

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from accelerate.utils import broadcast_object_list
from datasets import Dataset

from ..bulk import process_state
from ..data import RowError
from ..data.example import image_key
from ..retrieval import EmbeddingIndex, build_index
from .benchmark_data import BenchmarkData
from .embedders import ModelEmbedder


def question_parts(data: BenchmarkData, number: int, instruction: str = "") -> list[Any]:
    """The image of a row, if it has one, and a text: its hint, its text, its choices, and an instruction, each in a
    line of its own."""
    row = data.rows[number]
    images = [] if row.get("image") is None else [data.open(number, "image")]
    text = "\n".join(filter(None, [_text(row), instruction]))
    return [*images, text] if text else images


@contextmanager
def knowledge_index(
    embedder: ModelEmbedder, data: BenchmarkData, store_images: bool, show_progress: bool = False
) -> Iterator[tuple[EmbeddingIndex, dict[str, int]]]:
    """
    An index of the knowledge of a benchmark, without the rows that are its questions. It lasts as long as the context,
    and all processes share it.

    Args:
        embedder: The model.
        data: The questions, with knowledge.
        store_images: Whether the index keeps images.
        show_progress: Whether to draw a progress bar.

    Returns:
        The index; and the number of its entries and of the rows that were left out, by name.

    Raises:
        ValueError: the benchmark has no knowledge, all of it are questions, or a row cannot be used.
        ImportError: LanceDB is not installed.
    """
    if data.knowledge is None:
        raise ValueError("This benchmark declares no `knowledge` to retrieve from.")
    questions = _questions_in(data.knowledge, data)
    kept = [number for number in range(len(data.knowledge.rows)) if number not in questions]
    if not kept:
        raise ValueError(f"All {len(questions)} rows of the knowledge are questions of the benchmark.")
    rows = Dataset.from_dict({"number": kept}).with_transform(_Chats(data.knowledge))
    with _shared_folder() as folder:
        try:
            index = build_index(
                embedder.model,
                embedder.processor,
                rows,
                folder / "index",
                source="knowledge",
                metadata_columns=[],
                store_images=store_images,
                batch_size=embedder.batch_size,
                show_progress=show_progress,
            )
        except RowError as error:
            raise RowError(kept[error.row], error.reason, "the knowledge") from error
        yield index, {"entries": len(index), "questions_left_out_of_the_entries": len(questions)}


def _text(row: Mapping[str, Any]) -> str:
    choices = row.get("choices") or []
    lines = [f"Context: {row['hint']}"] if row.get("hint") else []
    return "\n".join([*lines, row["text"], *(_choice(choices, place) for place in range(len(choices)))])


def _choice(choices: list[str], place: int) -> str:
    return f"{ascii_uppercase[place]}. {choices[place]}"


def _questions_in(knowledge: BenchmarkData, data: BenchmarkData) -> set[int]:
    """The rows of the knowledge whose texts and pixels are those of a question."""
    asked: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(data.rows):
        asked[_text(row)].append(number)
    keys: dict[int, str | None] = {}
    found = set()
    for number, row in enumerate(knowledge.rows):
        same = asked.get(_text(row), [])
        if same:
            keys |= {each: _image_key(data, each) for each in same if each not in keys}
            if _image_key(knowledge, number) in {keys[each] for each in same}:
                found.add(number)
    return found


def _image_key(data: BenchmarkData, number: int) -> str | None:
    if data.rows[number].get("image") is None:
        return None
    return image_key({"image": data.open(number, "image")})


@dataclass
class _Chats:
    """Makes chats of rows of the knowledge: what is embedded, and the answer that comes along."""

    data: BenchmarkData

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        return {"messages": [self._chat(number) for number in rows["number"]]}

    def _chat(self, number: int) -> list[dict[str, Any]]:
        row = self.data.rows[number]
        parts = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in question_parts(self.data, number)
        ]
        chat: list[dict[str, Any]] = [{"role": "user", "content": parts}]
        if "answer" in row:
            answer = _choice(row["choices"], row["answer"]) if row.get("choices") else row["answer"]
            chat.append({"role": "assistant", "content": answer})
        return chat


@contextmanager
def _shared_folder() -> Iterator[Path]:
    """A folder that all processes see, and that is removed afterwards."""
    state = process_state()
    names: list[Any] = [tempfile.mkdtemp() if state.is_main_process else None]
    if state.num_processes > 1:
        broadcast_object_list(names)
    try:
        yield Path(names[0])
        state.wait_for_everyone()
    finally:
        if state.is_main_process:
            shutil.rmtree(names[0], ignore_errors=True)

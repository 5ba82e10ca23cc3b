"""The nearest of many vectors: exactly, or by FAISS."""

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..outputs import writing


_TRAINING_SAMPLE = 100_000


def nearest_exactly(queries: torch.Tensor, chunks: Iterable[torch.Tensor], k: int) -> torch.Tensor:
    """Places `(n, k)` of the vectors with the largest inner products, best first. One chunk is in memory at a time.

    Args:
        queries (`torch.FloatTensor` of shape `(n, d)`).
        chunks: `torch.FloatTensor`s of shape `(m, d)`, of at least `k` rows together.
        k: How many to find.
    """
    best_scores = queries.new_empty(len(queries), 0)
    best_places = torch.empty(len(queries), 0, dtype=torch.long)
    start = 0
    for chunk in chunks:
        scores, places = (queries @ chunk.T).topk(min(k, len(chunk)))
        scores, places = torch.cat([best_scores, scores], 1), torch.cat([best_places, places + start], 1)
        best_scores, order = scores.topk(min(k, scores.shape[1]))
        best_places = places.gather(1, order)
        start += len(chunk)
    return best_places


def make_faiss_index(factory: str, width: int) -> Any:
    """An empty FAISS index of inner products.

    Raises:
        ImportError: faiss is not installed.
        ValueError: FAISS cannot make `factory` for vectors of this width.
    """
    faiss = _faiss()
    try:
        return faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"FAISS makes no index `faiss={factory!r}` of vectors of width {width} "
            f"({_reason(error)}). Try 'Flat', 'HNSW32' or 'IVF1024,Flat'."
        ) from error


def write_faiss_index(
    factory: str, width: int, count: int, chunks: Callable[[], Iterable[torch.Tensor]], file: Path
) -> None:
    """
    Makes a FAISS index of many vectors, and writes it whole or not at all.

    Args:
        factory: As in FAISS's index factory.
        width: Size of a vector.
        count: Number of vectors.
        chunks: Returns all of them, `torch.FloatTensor`s of shape `(m, width)`; called again for another pass.
        file: What to write.

    Raises:
        ImportError: faiss is not installed.
        ValueError: FAISS cannot make such an index, or there are too few vectors to train it.
    """
    index = make_faiss_index(factory, width)
    if not index.is_trained:
        step = max(1, count // _TRAINING_SAMPLE)
        sample = torch.cat([chunk[::step] for chunk in chunks()])
        try:
            index.train(sample.numpy())
        except RuntimeError as error:
            raise ValueError(
                f"FAISS cannot train `faiss={factory!r}` on {len(sample)} vectors ({_reason(error)}). The embeddings "
                "are kept: run again with another one, or without."
            ) from error
    for chunk in chunks():
        index.add(chunk.numpy())
    with writing(file) as unfinished:
        _faiss().write_index(index, str(unfinished))


def read_faiss_index(file: Path, parameters: str | None = None) -> Any:
    """
    Args:
        file: What [`write_faiss_index`] wrote.
        parameters: Of the search, in FAISS's own words: `"nprobe=16"`, `"efSearch=64"`.

    Raises:
        ImportError: faiss is not installed.
        ValueError: the index has no such parameters.
    """
    faiss = _faiss()
    index = faiss.read_index(str(file))
    if parameters:
        try:
            faiss.ParameterSpace().set_index_parameters(index, parameters)
        except RuntimeError as error:
            raise ValueError(f"FAISS cannot set `faiss_parameters={parameters!r}`: {_reason(error)}.") from error
    return index


def _faiss() -> Any:
    try:
        return import_module("faiss")
    except ImportError as error:
        raise ImportError("This index is searched by FAISS: `pip install 'hf-unigd[faiss]'`.") from error


def _reason(error: RuntimeError) -> str:
    """FAISS's message without the C++ function that raised it."""
    return str(error).strip().rsplit(": ", 1)[-1]

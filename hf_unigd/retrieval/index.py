"""Rows and their embeddings in a folder, searched by the model that made them."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from ..modeling import UniGDProcessor
from .description import IndexDescription
from .embedding import embed_sequences
from .entries import Hit, make_hit
from .nearest import nearest_exactly, read_faiss_index
from .parts import read_entries, rows_done


logger = logging.getLogger(__name__)

FAISS_FILE = "index.faiss"
_ROWS_PER_CHUNK = 16384


class EmbeddingIndex:
    """
    An index that [`build_index`] made, memory-mapped.

    Attributes:
        description: The model, and what else the index was made of.
        entries: Dataset of the columns `row`, `sequence`, `answer` and `embedding` (float32 unit vectors).
        faiss: The FAISS index that it is searched by; None where the search is exact.
    """

    def __init__(self, description: IndexDescription, entries: Dataset, faiss: Any = None):
        self.description = description
        self.entries = entries
        self.faiss = faiss

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def width(self) -> int:
        return self.entries.features["embedding"].length

    @classmethod
    def load(cls, folder: str | Path, faiss_parameters: str | None = None) -> "EmbeddingIndex":
        """
        Args:
            folder: What [`build_index`] wrote.
            faiss_parameters: Of a FAISS search, in FAISS's own words: `"nprobe=16"`, `"efSearch=64"`.

        Raises:
            ValueError: `folder` holds no index or an unfinished one, or there are `faiss_parameters` for an exact one.
            ImportError: the index is searched by FAISS, which is not installed.
        """
        folder = Path(folder)
        description = IndexDescription.load(folder)
        if description is None:
            raise ValueError(f"{folder} holds no index; `hf-unigd index --output {folder}` makes one.")
        done = rows_done(folder)
        if done < description.num_rows or (description.faiss and not (folder / FAISS_FILE).is_file()):
            raise ValueError(
                f"The index in {folder} is unfinished: it has {done} of {description.num_rows} rows. Run the same "
                "`hf-unigd index` again, which goes on where it stopped."
            )
        if faiss_parameters and not description.faiss:
            raise ValueError(f"`faiss_parameters={faiss_parameters!r}` for {folder}, which is searched exactly.")
        faiss = read_faiss_index(folder / FAISS_FILE, faiss_parameters) if description.faiss else None
        return cls(description, read_entries(folder), faiss)

    def search(
        self,
        model: PreTrainedModel,
        processor: UniGDProcessor,
        sequences: Sequence[Any],
        k: int = 5,
        batch_size: int = 32,
        instruction: str | None = None,
    ) -> list[list[Hit]]:
        """
        The entries most similar to each of some sequences.

        Args:
            model: The model that made the index.
            processor: Its processor.
            sequences: Texts, images, or lists of both, as [`UniGDProcessor.process_sequences`] takes them.
            k: How many to find for each.
            batch_size: Sequences a forward pass.
            instruction: The instruction of the queries, by default the processor's `"query"`.

        Returns:
            For each sequence its hits, best first.

        Raises:
            ValueError: another model made the index, or `k` is out of range.
            SequenceError: a sequence cannot be processed, or is longer than the model's context.
        """
        self._check_k(k)
        self.description.check_model(model, processor)
        queries = embed_sequences(
            model,
            processor,
            sequences,
            batch_size,
            self.description.truncate_dim,
            show_progress=False,
            prompt_name="query" if instruction is None else None,
            instruction=instruction,
        )
        return self.nearest(queries, k)

    def nearest(self, queries: torch.Tensor, k: int = 5) -> list[list[Hit]]:
        """
        As [`search`], for embeddings. An approximate FAISS index may find fewer than `k`, which the log says.

        Args:
            queries (`torch.FloatTensor` of shape `(n, d)`): Unit vectors.
            k: How many to find for each.

        Raises:
            ValueError: `queries` has another width than the embeddings, or `k` is out of range.
        """
        self._check_k(k)
        if queries.shape[1] != self.width:
            raise ValueError(f"Queries of width {queries.shape[1]}, but the index holds vectors of {self.width}.")
        queries = queries.float().cpu()
        if self.faiss is None:
            places = nearest_exactly(queries, self.chunks(), k)
        else:
            places = torch.from_numpy(self.faiss.search(queries.numpy(), k)[1])
            missing = int((places < 0).sum())
            if missing:  # FAISS looks at a part of the vectors alone, and fills up with -1
                logger.warning(
                    "FAISS found %d of %d entries; raise `faiss_parameters`.", places.numel() - missing, places.numel()
                )
        return [self._hits(query, row[row >= 0].tolist()) for query, row in zip(queries, places, strict=True)]

    def chunks(self) -> Iterator[torch.Tensor]:
        """The embeddings, `(m, d)` float32 at a time."""
        embeddings = self.entries.with_format("arrow")
        for start in range(0, len(self), _ROWS_PER_CHUNK):
            column = embeddings[start : start + _ROWS_PER_CHUNK]["embedding"].combine_chunks()
            yield torch.tensor(column.flatten().to_numpy()).reshape(-1, self.width)

    def _hits(self, query: torch.Tensor, places: list[int]) -> list[Hit]:
        entries = [self.entries[place] for place in places]
        hits = [make_hit(entry, float(query @ torch.tensor(entry["embedding"]))) for entry in entries]
        # FAISS may know compressed vectors alone; these scores are those of the vectors themselves.
        return sorted(hits, key=lambda hit: -hit.score)

    def _check_k(self, k: int) -> None:
        if len(self) == 0:
            raise ValueError("The index is empty: there is nothing to find.")
        if not 1 <= k <= len(self):
            raise ValueError(f"`k={k}` must lie between 1 and the number of entries in the index, {len(self)}.")

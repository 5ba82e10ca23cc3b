"""A folder of embeddings with the rows that they belong to, searched exactly."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, load_from_disk

from ..evaluation import rank_candidates


@dataclass
class EmbeddingIndex:
    """
    Rows and their embeddings.

    Attributes:
        rows: A dataset with the column `embedding` (float32 unit vectors) and what is shown of each row: `row` (its
            number in the source), `text`, `image`.
        model: Id or folder of the model that made the embeddings.
    """

    rows: Dataset
    model: str

    def search(self, queries: torch.Tensor, k: int = 5) -> list[list[tuple[float, dict]]]:
        """The `k` most similar rows of each query, best first, with their cosine similarities.

        Args:
            queries (`torch.FloatTensor` of shape `(n, d)`): Unit vectors.
            k: How many; at most the number of rows.

        Raises:
            ValueError: `queries` has another width than the embeddings, or `k` is out of range.
        """
        if not 1 <= k <= len(self.rows):
            raise ValueError(f"`k={k}` must lie between 1 and the number of rows in the index, {len(self.rows)}.")
        embeddings = torch.as_tensor(self.rows.with_format("torch", columns=["embedding"])["embedding"][:])
        if queries.shape[1] != embeddings.shape[1]:
            raise ValueError(
                f"Queries of width {queries.shape[1]}, but the index holds vectors of {embeddings.shape[1]}."
            )
        ranking = rank_candidates(queries, embeddings, k)
        shown = self.rows.remove_columns("embedding")
        return [
            [(float(query @ embeddings[place]), shown[place]) for place in places]
            for query, places in zip(queries, ranking.tolist(), strict=True)
        ]

    def save(self, folder: str | Path) -> None:
        self.rows.save_to_disk(str(folder))
        (Path(folder) / "index.json").write_text(json.dumps({"model": self.model}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "EmbeddingIndex":
        """
        Raises:
            ValueError: `folder` holds no index.
        """
        description = Path(folder) / "index.json"
        if not description.is_file():
            raise ValueError(f"{folder} holds no index; `hf-unigd embed --output {folder}` makes one.")
        return cls(load_from_disk(str(folder)), json.loads(description.read_text(encoding="utf-8"))["model"])

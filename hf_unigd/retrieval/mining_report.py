"""What mining has found: numbers and similarities, as sentence-transformers reports them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..bulk.parts import PartFolder
from .negative_rules import RULES, NegativeRules


SCORES = pa.schema(
    [
        ("row", pa.int64()),
        ("positive_score", pa.float32()),
        ("negative_scores", pa.list_(pa.float32())),
        ("candidates", pa.int64()),
        *((f"skipped_{name}", pa.int64()) for name in RULES),
    ]
)
_METRICS: dict[str, Callable[[np.ndarray], np.floating]] = {
    "Mean": np.mean,
    "Median": np.median,
    "Std": np.std,
    "Min": np.min,
    "25%": lambda scores: np.quantile(scores, 0.25),
    "50%": lambda scores: np.quantile(scores, 0.5),
    "75%": lambda scores: np.quantile(scores, 0.75),
    "Max": np.max,
}


@dataclass(frozen=True)
class MiningReport:
    """
    Attributes:
        rules: The rules by which negatives were chosen.
        rows: Number of rows that were written.
        left_out: Number of rows for which there are not enough negatives.
        candidates: Number of entries that the rules were applied to.
        skipped: Number of those that each rule refused.
        positive_scores (`np.ndarray`): Similarities of all rows' anchors to their positives, float32.
        negative_scores (`np.ndarray` of shape `(rows, num_negatives)`): Those to the negatives, float32.
        differences (`np.ndarray` of shape `(rows, num_negatives)`): How much smaller the latter are, float32.
    """

    rules: NegativeRules
    rows: int
    left_out: int
    candidates: int
    skipped: dict[str, int]
    positive_scores: np.ndarray
    negative_scores: np.ndarray
    differences: np.ndarray

    @classmethod
    def of(cls, parts: PartFolder, rules: NegativeRules) -> "MiningReport":
        """The report of the scores in a folder, a table of `SCORES` a part."""
        table = pa.concat_tables([SCORES.empty_table(), *map(_scores, map(parts.read, parts.finished()))])
        positive = table["positive_score"].to_numpy()
        enough = pc.equal(pc.list_value_length(table["negative_scores"]), rules.num_negatives)
        found = table["negative_scores"].filter(enough).combine_chunks().flatten()
        negative = found.to_numpy(zero_copy_only=False).reshape(-1, rules.num_negatives)
        kept = enough.to_numpy().astype(bool)
        return cls(
            rules,
            int(kept.sum()),
            int((~kept).sum()),
            int(table["candidates"].to_numpy().sum()),
            {name: int(table[f"skipped_{name}"].to_numpy().sum()) for name in RULES},
            positive,
            negative,
            positive[kept, None] - negative,
        )

    def __str__(self) -> str:
        columns = [self.positive_scores, self.negative_scores, self.differences]
        lines = [f"{'Metric':<6} {'Positive':>14} {'Negative':>14} {'Difference':>14}"]
        lines.append(f"{'Count':<6} {self.positive_scores.size:>14,} {self.negative_scores.size:>14,}")
        for name, compute in _METRICS.items():
            values = " ".join(f"{compute(scores):>14.4f}" if scores.size else f"{'-':>14}" for scores in columns)
            lines.append(f"{name:<6} {values}")
        for name, count in self.skipped.items():
            if count:
                lines.append(
                    f"Skipped {count:,} potential negatives ({count / self.candidates:.2%}) due to the {name} of "
                    f"{getattr(self.rules, name)}."
                )
        if self.left_out:
            lines.append(
                f"Left out {self.left_out:,} rows ({self.left_out / self.positive_scores.size:.2%}), which have fewer "
                f"than {self.rules.num_negatives} negatives. Other values of {self._remedies()} find more."
            )
        return "\n".join(lines)

    def _remedies(self) -> str:
        given = [name for name in RULES if getattr(self.rules, name) is not None]
        range_min = ["range_min"] if self.rules.range_min else []
        return ", ".join(f"`{name}`" for name in ("num_negatives", "range_max", *range_min, *given))


def _scores(table: pa.Table) -> pa.Table:
    return table.select(SCORES.names).replace_schema_metadata(None)

"""What is measured of every arm: retrieval, hard negatives, and what is kept of generation."""

from typing import Any

from torch.utils import data

from hf_unigd.evaluation.benchmark_data import read_benchmark
from hf_unigd.evaluation.benchmarks import load_benchmarks
from hf_unigd.evaluation.embedders import Embedder, ModelEmbedder
from hf_unigd.evaluation.matches import ImageSettings, RowReader, read_matches
from hf_unigd.evaluation.perplexity import perplexity
from hf_unigd.evaluation.protocols import PROTOCOLS
from hf_unigd.evaluation.row_evaluation import retrieval_scores

from .corpus import QUESTIONS, chat, scenes


# The benchmarks, and what their metrics begin with in our files.
BENCHMARKS = {
    "scenes_retrieval": "",
    "scenes_sugarcrepe": "sugarcrepe_",
    "scenes_winoground": "winoground_",
    "scenes_pope": "pope_",
}


class Described(data.Dataset):
    """Scenes, and the answer to a question that the base model was asked too: their long captions."""

    def __init__(self, rows: Any):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row = self.rows[place]
        return chat(row, [(QUESTIONS["description"][0], row["long_caption"])])


def measure(embedder: Embedder) -> dict[str, float]:
    """
    Measures whatever embeds on held-out scenes.

    Returns:
        `text_to_image_recall_at_1`, ...; `sugarcrepe_KIND`; `winoground_text_score`, .... Of what also generates:
        `pope_accuracy`, `pope_CATEGORY`; and `perplexity`, that of long captions after the question that the base
        model learned them by.
    """
    benchmarks = load_benchmarks()
    found: dict[str, float] = {}
    for name, prefix in BENCHMARKS.items():
        benchmark = benchmarks[name]
        if benchmark.protocol == "yes_no" and not isinstance(embedder, ModelEmbedder):
            continue
        scores, _ = PROTOCOLS[benchmark.protocol](embedder, read_benchmark(benchmark, None))
        for metric, each in scores.items():
            own = metric if metric == "accuracy" else metric.removesuffix("_accuracy")
            found[f"{prefix}{own}"] = each.metric
    if isinstance(embedder, ModelEmbedder):
        targets = perplexity(embedder, RowReader.of(Described(scenes("test")), embedder, ImageSettings(), 0))
        assert targets is not None
        found["perplexity"] = targets.metric
    return found


def validate(embedder: Embedder) -> float:
    """Recall at 1 on the validation scenes, the mean of both directions."""
    reader = RowReader.of(scenes("validation"), embedder, ImageSettings())
    scores = retrieval_scores(embedder, read_matches(reader), (1,))
    return sum(each.metric for each in scores.values()) / len(scores)

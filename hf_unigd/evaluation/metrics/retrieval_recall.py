"""Recall at k as an `evaluate` metric: `evaluate.load(hf_unigd.evaluation.METRIC_SCRIPT)`."""

import datasets
import evaluate


_DESCRIPTION = """
Share of the queries that have at least one relevant candidate among the first k, as CLIP reports it: any caption of an
image counts as relevant (MTEB calls this `cv_recall_at_k`).
"""

_INPUTS = """
Args:
    predictions: for each query, indices of candidates, best first: at least `max(ks)` of them, or all candidates.
    references: for each query, indices of its relevant candidates.
    ks: the values of k; 1, 5 and 10 by default.
Returns:
    `recall_at_1`, `recall_at_5`, ... between 0 and 1.
"""

_CITATION = """
@inproceedings{radford2021clip,
  title={Learning Transferable Visual Models From Natural Language Supervision},
  author={Radford, Alec and others},
  booktitle={ICML},
  year={2021}
}
"""


class RetrievalRecall(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(self, predictions, references, ks=(1, 5, 10)):
        for query, relevant in enumerate(references):
            if len(relevant) == 0:
                raise ValueError(f"Query {query} has no relevant candidate, so its recall is undefined.")
        recalls = {}
        for k in ks:
            hits = [
                not set(relevant).isdisjoint(ranking[:k])
                for ranking, relevant in zip(predictions, references, strict=True)
            ]
            recalls[f"recall_at_{k}"] = sum(hits) / len(hits)
        return recalls

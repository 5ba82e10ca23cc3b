"""Writes model cards from a template."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..version import __version__


TEMPLATE = Path(__file__).parent / "model_card_template.md"
CURVES_NAME, RETRIEVAL_NAME = "curves.png", "retrieval.png"

CITATIONS = {
    "vladva": """\
```bibtex
@inproceedings{ouali2025vladva,
  title={VladVA: Discriminative Fine-tuning of LVLMs},
  author={Ouali, Yassine and Bulat, Adrian and Xenos, Alexandros and Zaganidis, Anestis and Maniadis Metaxas, Ioannis and Martinez, Brais and Tzimiropoulos, Georgios},
  booktitle={CVPR},
  year={2025}
}
```""",  # noqa: E501
    "sugar": """\
```bibtex
@inproceedings{chow2024sugar,
  title={Unified Generative and Discriminative Training for Multi-modal Large Language Models},
  author={Chow, Wei and others},
  booktitle={NeurIPS},
  year={2024}
}
```""",
}


def make_model_card(
    repo_id: str,
    title: str,
    summary: str,
    training: Mapping[str, object],
    limits: str,
    *,
    dataset: str | None = None,
    metrics: Mapping[str, float] | None = None,
    methods: Sequence[str] = ("vladva",),
    base_model: str | None = None,
    base_model_relation: str | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
    curves_picture: str | None = None,
    retrieval_picture: str | None = None,
    is_trained: bool = True,
) -> ModelCard:
    """
    A model card with metadata that the Hub understands.

    Args:
        repo_id: The id that the usage snippets load.
        title: Heading.
        summary: One sentence about what was trained on which data.
        training: Settings by name, shown as a table.
        limits: What the checkpoint is not good for.
        dataset: Name of the evaluation data that all `metrics` were measured on.
        metrics: Values by name. Without any, the card says that nothing was measured.
        methods: Which of `"vladva"` and `"sugar"` were used; they become tags and citations.
        base_model: Hub id of the backbone's weights, if training started from any.
        base_model_relation: `"finetune"` or `"adapter"`.
        datasets: Hub ids of the training data.
        license: Licence of the weights.
        curves_picture, retrieval_picture: File names of images beside the card.
        is_trained: Whether there are weights. The card of a recipe says that there are none.

    Raises:
        ValueError: there are metrics without the name of their data.
    """
    if metrics and not dataset:
        raise ValueError("`metrics` need `dataset`, the name of the data that they were measured on.")
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=str(dataset),
            dataset_name=str(dataset),
            metric_type=name,
            metric_value=round(value, 4),
        )
        for name, value in (metrics or {}).items()
    ]
    card_data = ModelCardData(
        model_name=title if results else None,
        base_model=base_model,
        base_model_relation=base_model_relation if base_model else None,
        datasets=list(datasets) or None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["hf-unigd", "embeddings", "retrieval", "sentence-transformers", *methods],
        license=license,
        eval_results=results or None,
    )
    measured = {name: f"{value:.4f}" for name, value in (metrics or {}).items()}
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        title=title,
        summary=summary,
        version=__version__,
        results=f"On {dataset}:\n\n{_table('Metric', measured)}" if measured else "Nothing was measured.",
        training=_table("Setting", training),
        limits=limits,
        citations="\n\n".join(CITATIONS[method] for method in methods),
        curves_picture=curves_picture,
        retrieval_picture=retrieval_picture,
        is_trained=is_trained,
    )


def is_hub_id(name: str | None) -> bool:
    """Whether `name` is an id of the Hub, not a folder or file on this machine. Only an id may stand in a card."""
    if name is None or re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is None:
        return False
    return not Path(name).exists()


def _table(heading: str, rows: Mapping[str, object]) -> str:
    lines = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join([f"| {heading} | Value |", "|---|---|", *lines])

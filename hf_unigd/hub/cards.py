"""Model cards, filled from what a run knows."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..version import __version__


TEMPLATE = Path(__file__).parent / "model_card_template.md"


def make_model_card(
    repo_id: str,
    title: str,
    summary: str,
    dataset: str,
    metrics: dict[str, float],
    training: dict[str, object],
    limits: str,
    base_model: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """
    A model card with metadata that the Hub understands.

    Args:
        repo_id: What the usage snippet loads.
        title: Heading.
        summary: What was trained on what, in one sentence.
        dataset: Name of the evaluation data, which all `metrics` were measured on.
        metrics: Values by name.
        training: Settings by name, as a table.
        limits: What the checkpoint is not good for.
        base_model: Hub id of the backbone's weights, where there were any.
        license: Licence of the weights.
    """
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=name,
            metric_value=round(value, 4),
        )
        for name, value in metrics.items()
    ]
    card_data = ModelCardData(
        model_name=title,
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["hf-unigd", "embeddings", "retrieval", "vladva"],
        license=license,
        eval_results=results,
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        title=title,
        summary=summary,
        version=__version__,
        results=_table("Metric", {name: f"{value:.4f}" for name, value in metrics.items()}),
        training=_table("Setting", training),
        limits=limits,
    )


def _table(heading: str, rows: dict[str, object]) -> str:
    return "\n".join(
        [f"| {heading} | Value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    )

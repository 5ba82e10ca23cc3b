"""Files that all recipes write beside the checkpoint."""

import json

import torch

from ..hub import make_model_card
from ..hub.cards import RETRIEVAL_NAME
from ..outputs import writing
from .arguments import QuickstartArguments


def write_card(
    args: QuickstartArguments,
    metrics: dict[str, float],
    minutes: float,
    summary: str,
    dataset: str,
    objective: str,
    methods: list[str],
) -> None:
    """Writes the model card, `README.md`."""
    card = make_model_card(
        repo_id=str(args.folder),
        title=args.folder.name,
        summary=summary,
        dataset=dataset,
        metrics=metrics,
        training={
            "objective": objective,
            "steps": args.max_steps,
            "batch size": args.batch_size,
            "hardware": f"{torch.get_num_threads()} CPU threads",
            "minutes": f"{minutes:.1f}",
        },
        limits="It knows icons alone. It shows that training, saving and loading work, and has no other use.",
        license="apache-2.0",
        methods=methods,
        retrieval_picture=RETRIEVAL_NAME if (args.folder / RETRIEVAL_NAME).is_file() else None,
    )
    with writing(args.folder / "README.md") as file:
        card.save(file)


def write_metrics(args: QuickstartArguments, metrics: dict[str, dict[str, float]], minutes: float) -> None:
    """Writes `metrics.json`."""
    text = json.dumps({**metrics, "minutes": round(minutes, 2)}, indent=2)
    with writing(args.folder / "metrics.json") as file:
        file.write_text(f"{text}\n", encoding="utf-8")

"""Writes the tables and figures of a comparison of prompts."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .comparison import PromptComparison
from .figures import draw_attention, draw_entropies, draw_recalls, draw_top_tokens, draw_variances
from .statistics import KS, components_for, correlation
from .views import ModelView


VARIANCE = 0.9


def write_report(
    comparison: PromptComparison,
    views: Mapping[str, ModelView],
    images: Sequence[Image.Image],
    rows: Sequence[int],
    folder: Path,
) -> None:
    """
    Writes `prompts.csv`, `pairs.csv`, `cumulative_variance.csv`, `top_tokens.csv` and `attention.csv`, and the figures
    `entropy.png`, `cumulative_variance.png`, `top_tokens.png`, `recall.png` and `attention.png`. Without images, those
    of attention are left out.

    Args:
        comparison: The comparison.
        views: How the best pair looks inside each model.
        images: The images of which the views show the attention.
        rows: Number of the row of each image.
        folder: Folder to write to.

    Raises:
        ImportError: matplotlib is not installed.
    """
    best = comparison.best()
    chosen = comparison.pair(best)
    _write_tables(comparison, folder)
    _write_csv(
        folder / "top_tokens.csv",
        ("model", "modality", "prompt", "token", "probability"),
        (
            (model, modality, chosen[modality], token, f"{probability:.6g}")
            for model, view in views.items()
            for modality, tokens in view.tokens.items()
            for token, probability in tokens
        ),
    )
    draw_entropies(comparison.entropies, chosen, folder / "entropy.png")
    draw_variances(comparison.curves, comparison.entropies, chosen, folder / "cumulative_variance.png")
    by_modality = {modality: {model: view.tokens[modality] for model, view in views.items()} for modality in chosen}
    draw_top_tokens(by_modality, folder / "top_tokens.png")
    entropies, recalls = comparison.pair_entropies, comparison.pairs.means
    draw_recalls(entropies, recalls, best, correlation(entropies, recalls), folder / "recall.png")
    if images:
        _write_csv(
            folder / "attention.csv",
            ("model", "row", "share_of_attention", "share_of_positions"),
            (
                (model, row, f"{found.share:.6g}", f"{found.density:.6g}")
                for model, view in views.items()
                for row, found in zip(rows, view.attention, strict=True)
            ),
        )
        attention = {model: view.attention for model, view in views.items()}
        draw_attention(images, attention, folder / "attention.png")


def _write_tables(comparison: PromptComparison, folder: Path) -> None:
    _write_csv(
        folder / "prompts.csv",
        ("modality", "prompt", "entropy", "entropy_std", f"components_for_{VARIANCE:.0%}", "best_mean_recall"),
        (
            (
                modality,
                name,
                f"{values.mean():.6g}",
                f"{values.std():.6g}",
                components_for(comparison.curves[modality][name], VARIANCE),
                f"{comparison.pairs.means.amax(1 - axis)[place]:.6g}",
            )
            for axis, (modality, by_prompt) in enumerate(comparison.entropies.items())
            for place, (name, values) in enumerate(by_prompt.items())
        ),
    )
    directions = ("image_to_text", "text_to_image")
    image_names, text_names = comparison.names.values()
    entropies, means = comparison.pair_entropies, comparison.pairs.means
    _write_csv(
        folder / "pairs.csv",
        (
            "image_prompt",
            "text_prompt",
            "entropy",
            "mean_recall",
            *(f"{direction}_recall_at_{k}" for direction in directions for k in KS),
        ),
        (
            (
                image,
                text,
                f"{entropies[a, b]:.6g}",
                f"{means[a, b]:.6g}",
                *(f"{value:.6g}" for value in comparison.pairs.recalls[a, b].flatten().tolist()),
            )
            for a, image in enumerate(image_names)
            for b, text in enumerate(text_names)
        ),
    )
    _write_csv(
        folder / "cumulative_variance.csv",
        ("modality", "prompt", "components", "cumulative_variance"),
        (
            (modality, name, place, f"{value:.6g}")
            for modality, by_prompt in comparison.curves.items()
            for name, curve in by_prompt.items()
            for place, value in enumerate(curve.tolist(), 1)
        ),
    )


def _write_csv(file: Path, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(names)
        writer.writerows(rows)

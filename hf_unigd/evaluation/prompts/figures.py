"""The figures of prompts: entropy, variance, top tokens, recall and attention (VladVA, figures 2 to 6)."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..figures import make_figure, save_figure
from .attention import ImageAttention


_TITLES = {"image": "image prompts", "text": "text prompts"}
_COLOURS = "viridis"
_BEST = "tab:red"


def draw_entropies(entropies: Mapping[str, Mapping[str, torch.Tensor]], best: Mapping[str, str], output: Path) -> None:
    """
    Draws the entropy of the next token at the summary token for each prompt, sorted (VladVA, figure 2).

    Args:
        entropies: By modality and prompt, those of all images or captions, in nats.
        best: The chosen prompt of each modality, which is drawn in red.
        output: PNG file to write.
    """
    longest = max(map(len, entropies.values()))
    figure = make_figure(figsize=(13, 1 + 0.16 * longest), layout="constrained")
    for axes, (modality, by_prompt) in zip(figure.subplots(1, 2), entropies.items(), strict=True):
        names = sorted(by_prompt, key=lambda name: float(by_prompt[name].mean()))
        means = [float(by_prompt[name].mean()) for name in names]
        spreads = [float(by_prompt[name].std()) for name in names]
        colours = [_BEST if name == best[modality] else "tab:blue" for name in names]
        axes.barh(names, means, xerr=spreads, color=colours, height=0.7, error_kw={"lw": 0.7, "ecolor": "grey"})
        axes.set_yticks(range(len(names)), [textwrap.shorten(name, 62) for name in names], parse_math=False)
        axes.tick_params(labelsize=7)
        axes.margins(y=0.01)
        axes.set(title=f"Entropy of {_TITLES[modality]}", xlabel="entropy of the next token, in nats (mean ± std)")
    save_figure(figure, output)


def draw_variances(
    curves: Mapping[str, Mapping[str, torch.Tensor]],
    entropies: Mapping[str, Mapping[str, torch.Tensor]],
    best: Mapping[str, str],
    output: Path,
) -> None:
    """
    Draws the cumulative variance of the principal components of the embeddings, a line for each prompt (VladVA,
    figure 3).

    Args:
        curves: By modality and prompt, what [`~hf_unigd.evaluation.prompts.statistics.cumulative_variance`] returns.
        entropies: As in [`draw_entropies`]. They colour the lines.
        best: The chosen prompt of each modality, which is drawn in red.
        output: PNG file to write.
    """
    from matplotlib.cm import ScalarMappable

    figure = make_figure(figsize=(12, 4.5), layout="constrained")
    for axes, (modality, by_prompt) in zip(figure.subplots(1, 2), curves.items(), strict=True):
        colours = ScalarMappable(cmap=_COLOURS)
        means = np.array([float(entropies[modality][name].mean()) for name in by_prompt])
        colours.set_array(means)
        colours.autoscale()
        for (name, curve), colour in zip(by_prompt.items(), colours.to_rgba(means), strict=True):
            is_best = name == best[modality]
            axes.plot(
                range(1, len(curve) + 1),
                curve,
                color=_BEST if is_best else colour,
                linewidth=2 if is_best else 0.8,
                zorder=3 if is_best else 2,
                label="chosen" if is_best else None,
            )
        axes.set(xscale="log", xlabel="principal components", ylabel="cumulative variance", ylim=(0, 1.01))
        axes.set_title(f"Variance of {_TITLES[modality]}")
        axes.legend(loc="lower right", fontsize=8)
        figure.colorbar(colours, ax=axes, label="entropy, in nats")
    save_figure(figure, output)


def draw_top_tokens(tokens: Mapping[str, Mapping[str, Sequence[tuple[str, float]]]], output: Path) -> None:
    """
    Draws the likeliest tokens at the summary token, by modality (rows) and model (columns) (VladVA, figure 4). Spaces
    are drawn as a mark.

    Args:
        tokens: By modality and model, tokens and their mean probabilities, the likeliest first.
        output: PNG file to write.
    """
    columns = max(map(len, tokens.values()))
    figure = make_figure(figsize=(4.5 * columns, 3 * len(tokens)), layout="constrained")
    grid = figure.subplots(len(tokens), columns, squeeze=False, sharex="row")
    for line, (modality, by_model) in zip(grid, tokens.items(), strict=True):
        for axes, (name, found) in zip(line, by_model.items(), strict=True):
            axes.barh(range(len(found)), [probability for _, probability in found], color="tab:blue")
            tokens_shown = [token.replace(" ", "␣") for token, _ in found]
            axes.set_yticks(range(len(found)), tokens_shown, fontsize=8, parse_math=False)
            axes.invert_yaxis()
            axes.set_xlabel("mean probability", fontsize=8)
            axes.set_title(f"{modality} prompt ({name})", fontsize=9, parse_math=False)
    save_figure(figure, output)


def draw_recalls(
    entropies: torch.Tensor, recalls: torch.Tensor, best: tuple[int, int], correlation: float, output: Path
) -> None:
    """
    Draws recall over entropy, a point for each pair of prompts (VladVA, figure 5).

    Args:
        entropies, recalls (tensors of shape `(num_image_prompts, num_text_prompts)`): Mean entropy, in nats, and mean
            recall, from 0 to 1, of each pair.
        best: The places of the chosen pair, which is drawn in red.
        correlation: Pearson's, for the title.
        output: PNG file to write.
    """
    figure = make_figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(entropies.flatten(), recalls.flatten(), s=5, alpha=0.4, linewidths=0)
    axes.scatter(entropies[best], recalls[best], s=60, color=_BEST, marker="*", label="chosen")
    axes.set(xlabel="entropy of the next token, in nats (mean of both prompts)", ylabel="mean recall at 1, 5 and 10")
    axes.set_title(f"{recalls.numel()} pairs of prompts: correlation {correlation:.2f}")
    axes.legend(fontsize=8)
    save_figure(figure, output)


def draw_attention(
    images: Sequence[Image.Image], attention: Mapping[str, Sequence[ImageAttention]], output: Path
) -> None:
    """
    Draws how attention from the summary token is spread over images, by image (rows) and model (columns) (VladVA,
    figure 6). Every map is scaled to its own largest weight. Positions that are no grid are drawn as a strip.

    Args:
        images: The images.
        attention: By model, the attention of each image.
        output: PNG file to write.
    """
    figure = make_figure(figsize=(2.6 * (1 + len(attention)), 2.6 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), 1 + len(attention), squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for place, (line, image) in enumerate(zip(grid, images, strict=True)):
        line[0].imshow(image)
        for axes, (name, found) in zip(line[1:], attention.items(), strict=True):
            weights = np.asarray(found[place].weights)
            weights = weights.reshape(found[place].grid or (1, -1))
            axes.imshow(weights, cmap="magma", vmin=0, aspect="equal" if found[place].grid else "auto")
            share, density = found[place].share, found[place].density
            title = f"{name}: {share:.0%} of all attention,\nspread over {density:.0%} of the positions"
            axes.set_title(title, fontsize=7, parse_math=False)
    save_figure(figure, output)

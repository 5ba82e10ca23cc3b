"""Draws figures of retrieval results, of alignments and of comparisons."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..outputs import writing
from .comparison import Change
from .lmms_results import PREFIX


_MARK = b"tEXtSoftware\0hf-unigd"  # in a PNG file, the metadata stand before the pixels

# A result of a query: its image if it has one, its text, and whether it is relevant (None if this is unknown).
Result = tuple[Image.Image | None, str, bool | None]


def draw_retrieval(
    queries: Sequence[tuple[str | Image.Image, Sequence[Result]]], output: str | Path, title: str = ""
) -> None:
    """
    Draws one row per query: the query, then its results, best first. Relevant results have a green frame, others a red
    one, and results of unknown relevance a grey one.

    Args:
        queries: For each query its text or image, and its results.
        output: PNG file to write.
        title: Title, drawn above.

    Raises:
        ImportError: matplotlib is not installed.
    """
    columns = 1 + max(len(results) for _, results in queries)
    figure = make_figure(figsize=(1.7 * columns, 1.9 * len(queries)), layout="constrained")
    figure.suptitle(title, fontsize=9)
    grid = figure.subplots(len(queries), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for line, (query, results) in zip(grid, queries, strict=True):
        if isinstance(query, Image.Image):
            line[0].imshow(query)
        else:
            lines = textwrap.shorten(query, 160, placeholder=" ...") if len(query) > 160 else query
            wrapped = "\n".join(textwrap.fill(line, 20) for line in lines.splitlines())
            size = 10 if len(query) <= 60 else 7
            line[0].text(0.5, 0.5, wrapped, ha="center", va="center", fontsize=size, weight="bold")
        for axes, (image, text, is_relevant) in zip(line[1:], results, strict=False):
            axes.axis("on")
            axes.set(xticks=[], yticks=[])
            axes.set_title(textwrap.fill(text[:60], 26), fontsize=7)  # matplotlib wraps only at the figure's edge
            colour = {True: "tab:green", False: "tab:red", None: "lightgrey"}[is_relevant]
            for spine in axes.spines.values():
                spine.set(color=colour, linewidth=4)
            if image is not None:
                axes.imshow(image)
    save_figure(figure, output)


def draw_alignment(
    a: Sequence[Image.Image | str],
    b: Sequence[Image.Image | str],
    posterior: torch.Tensor,
    output: str | Path,
    title: str = "",
) -> None:
    """
    Draws the alignment of two sequences of images and sentences as a heat map, with `a` down the left side and `b`
    along the top. Long sentences are shortened.

    Args:
        a, b: Images and sentences of the two sequences.
        posterior (`torch.FloatTensor` of shape `(len(a), len(b))`): Values of the cells, from 0 to 1, as
            [`~hf_unigd.evaluation.alignment.align_slices`] returns them.
        output: PNG file to write.
        title: Title, drawn below the heat map.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `posterior` has another shape, or a sequence is empty.
    """
    if posterior.shape != (len(a), len(b)) or 0 in posterior.shape:
        raise ValueError(
            f"`posterior` must be of shape (len(a), len(b)) = ({len(a)}, {len(b)}), both positive, but it has shape "
            f"{tuple(posterior.shape)}."
        )
    cell = 0.6  # side of a cell in inches; three lines of a sentence, or an image, fit
    figure = make_figure(figsize=(cell * len(b), cell * len(a)))
    axes = figure.add_axes((0, 0, 1, 1))
    heat = axes.pcolormesh(posterior.cpu(), cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=1)
    axes.set(xticks=[], yticks=[], ylim=(len(a), 0))
    axes.set_xlabel(title, fontsize=9, labelpad=10)
    axes.spines[:].set_visible(False)
    for place, content in enumerate(a):
        _draw_slice(axes, content, cell, (0, place + 0.5), ("axes fraction", "data"), (-6, 0))
    for place, content in enumerate(b):
        _draw_slice(axes, content, cell, (place + 0.5, 1), ("data", "axes fraction"), (0, 6))
    bar = axes.inset_axes((1 + 0.25 / len(b), 0, 0.2 / len(b), 1))
    figure.colorbar(heat, cax=bar).ax.tick_params(labelsize=8)
    save_figure(figure, output, bbox_inches="tight", pad_inches=0.15)


_HEADLINES = re.compile(
    r"((question_|vqa_|choice_)?accuracy|rouge_l)(_with_retrieval)?|itt|tot|(text|image|group)_score|.*main_score|score"
    r"|cider|perplexity|.*recall_at_1"
)
_LMMS_HEADLINES = re.compile(r".*(exact_match|accuracy|anls|cider|score)", re.IGNORECASE)
_COLOURS = {"gained": "tab:green", "lost": "tab:red", "undecided": "tab:grey"}


def draw_changes(changes: Mapping[str, Sequence[Change]], output: str | Path, title: str = "") -> None:
    """
    Draws the changes of the main metrics of benchmarks with their intervals, a panel for each model: what was gained
    in green, what was lost in red, and what is undecided in grey. Of perplexity and of lmms-eval's metrics, which may
    have any scale, the change in percent of the base is drawn. Where less is better, it is drawn to the left where it
    rose, so that better is on the right everywhere.

    Args:
        changes: The changes by the name of the model.
        output: PNG file to write.
        title: Title, drawn above.

    Raises:
        ImportError: matplotlib is not installed.
    """
    shown = {name: [change for change in each if _is_headline(change)] for name, each in changes.items()}
    # What was measured of only some models has a line of its own all the same.
    lines = list(dict.fromkeys(f"{change.benchmark}: {change.metric}" for each in shown.values() for change in each))
    figure = make_figure(figsize=(2.6 + 3.4 * len(shown), 1.3 + 0.26 * len(lines)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, (name, each) in zip(panels, shown.items(), strict=True):
        for change in each:
            place = lines.index(f"{change.benchmark}: {change.metric}")
            scale = 100 if change.in_percent else 100 / abs(change.base)
            scale = -scale if change.less_is_better else scale
            colour = _COLOURS[change.verdict]
            if change.low is not None and change.high is not None:
                axes.plot([scale * change.low, scale * change.high], [place, place], color=colour, linewidth=2)
            axes.plot([scale * change.difference], [place], "o", color=colour, markersize=5)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(textwrap.shorten(name, 48, placeholder=" ..."), fontsize=9)
        axes.set_xlabel("worse  <  points (perplexity, lmms-eval: percent)  >  better", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(lines)), lines)
    panels[0].invert_yaxis()
    save_figure(figure, output)


def _is_headline(change: Change) -> bool:
    if change.benchmark.startswith(PREFIX):
        return (
            _LMMS_HEADLINES.fullmatch(change.metric) is not None and change.base != 0
        )  # of which there is no percent
    return _HEADLINES.fullmatch(change.metric) is not None


def _draw_slice(axes, content, cell, at, coordinates, offset) -> None:
    """Draws an image or a sentence at a distance of `offset` points to the left of, or above, the position `at`."""
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    above = offset[1] > 0
    if isinstance(content, Image.Image):
        points = cell * 72  # an inch has 72 points
        image = OffsetImage(np.asarray(content.convert("RGB")), zoom=0.9 * points / max(content.size))
        axes.add_artist(
            AnnotationBbox(
                image,
                at,
                xycoords=coordinates,
                xybox=offset,
                boxcoords="offset points",
                box_alignment=(0.5, 0) if above else (1, 0.5),
                frameon=False,
                pad=0,
                annotation_clip=False,
            )
        )
    else:
        axes.annotate(
            "\n".join(textwrap.wrap(content, 30, max_lines=3, placeholder=" …")),
            at,
            xycoords=coordinates,
            xytext=offset,
            textcoords="offset points",
            ha="center" if above else "right",
            va="bottom" if above else "center",
            rotation=90 if above else 0,
            fontsize=8,
            parse_math=False,  # a dollar sign is not the start of a formula
        )


def is_figure(file: Path) -> bool:
    """Whether a file is a figure that was drawn here."""
    with file.open("rb") as content:
        return _MARK in content.read(1024)


def save_figure(figure, output: str | Path, **kwargs) -> None:
    """Writes a figure to a PNG file, which [`is_figure`] recognises. `kwargs` are matplotlib's."""
    with writing(output) as file:
        figure.savefig(file, dpi=110, format="png", metadata={"Software": "hf-unigd"}, **kwargs)


def make_figure(**kwargs):
    """
    A new figure of matplotlib, which has the arguments `kwargs`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: `pip install 'hf-unigd[quickstart]'`.") from error
    return Figure(**kwargs)

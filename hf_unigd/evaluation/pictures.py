"""Retrieval as a picture."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image


# A result: its picture, its text, and whether it is right (None where nobody knows).
Result = tuple[Image.Image | None, str, bool | None]


def draw_retrieval(queries: Sequence[tuple[str | Image.Image, Sequence[Result]]], output: str | Path) -> None:
    """
    One row a query: the query, then its results, best first, framed green where right and red where wrong.

    Args:
        queries: Each a text or picture with its results.
        output: The file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: `pip install 'hf-unigd[quickstart]'`.") from error

    columns = 1 + max(len(results) for _, results in queries)
    figure = Figure(figsize=(1.7 * columns, 1.9 * len(queries)), layout="constrained")
    grid = figure.subplots(len(queries), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for line, (query, results) in zip(grid, queries, strict=True):
        if isinstance(query, Image.Image):
            line[0].imshow(query)
        else:
            line[0].text(0.5, 0.5, query, ha="center", va="center", wrap=True, fontsize=10, weight="bold")
        for axes, (image, text, is_right) in zip(line[1:], results, strict=False):
            axes.axis("on")
            axes.set(xticks=[], yticks=[])
            axes.set_title(text[:60], fontsize=7, wrap=True)
            colour = {True: "tab:green", False: "tab:red", None: "lightgrey"}[is_right]
            for spine in axes.spines.values():
                spine.set(color=colour, linewidth=4)
            if image is not None:
                axes.imshow(image)
    figure.savefig(output, dpi=110)

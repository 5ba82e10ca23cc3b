"""Draws the pictures of docs/evidence.md from the files of results."""

import textwrap
from pathlib import Path

from hf_unigd.evaluation.figures import make_figure
from hf_unigd.outputs import writing

from . import english, records
from .albums import Albums
from .arms import TABLES, Column
from .captions import judge_scene
from .corpus import scenes
from .tables import load_results, sample


IMAGES = Path(__file__).parents[2] / "docs" / "images"
CAPTIONS, ALBUM, CURVE, ENTROPY = (
    IMAGES / f"evidence_{name}.png" for name in ("captions", "album", "mixture", english.NAME)
)


def draw_captions(file: Path = CAPTIONS) -> bool:
    """Draws unseen pictures with what the base model says about them, if there is one. Right captions have a green
    frame."""
    said = records.read(records.RESULTS / "base.json").get("said", [])
    if not said:
        return False
    rows = scenes("test").select(range(len(said)))
    figure = make_figure(figsize=(2.1 * len(said), 2.9), layout="constrained")
    for axes, row, caption in zip(figure.subplots(1, len(said), squeeze=False)[0], rows, said, strict=True):
        colour = "tab:green" if judge_scene(caption, row["long_caption"])["all"] else "tab:red"
        axes.imshow(row["image"])
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel(textwrap.fill(caption, 30), fontsize=7)
        axes.spines[:].set(color=colour, linewidth=3)
    with writing(file) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120)
    return True


def draw_album(file: Path = ALBUM) -> None:
    """Draws the pictures of the first album of the test, with their captions."""
    album = Albums(scenes("test").select(range(1)))[0]
    figure = make_figure(figsize=(2.1 * len(album["images"]), 2.7), layout="constrained")
    for axes, image, caption in zip(
        figure.subplots(1, len(album["images"])), album["images"], album["captions"], strict=True
    ):
        axes.imshow(image)
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel(textwrap.fill(caption, 28), fontsize=8)
    with writing(file) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120)


def draw_mixture(file: Path = CURVE) -> bool:
    """Draws retrieval over perplexity, a point for every seed and weight of the next-token loss, if two weights or
    more have run."""
    rows = TABLES["mixture"].rows
    results = load_results(list(rows))
    retrieval = Column("", ("text_to_image_recall_at_1", "image_to_text_recall_at_1"))
    perplexity = Column("", ("perplexity",), is_share=False)
    drawn = {}
    for name, title in rows.items():
        x, y = sample(results[name], perplexity), sample(results[name], retrieval)
        if x is not None and y is not None:
            drawn[title] = x, y
    if len(drawn) < 2:
        return False
    figure = make_figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([x.mean for x, _ in drawn.values()], [y.mean for _, y in drawn.values()], color="0.7")
    for title, (x, y) in drawn.items():
        axes.plot(x.values, y.values, "o", label=title)
    axes.set(xlabel="perplexity of held-out long captions", ylabel="R@1, mean of both directions (%)")
    axes.legend(title="contrastive : next-token")
    with writing(file) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120)
    return True


def draw_prompt_entropy(file: Path = ENTROPY) -> bool:
    """Draws the recall of every pair of prompts over its entropy, if a seed has run."""
    found = english.load_results()
    if not found:
        return False
    figure = make_figure(figsize=(4 * len(found), 3.6), layout="constrained")
    for axes, (seed, (record, entropies, recalls)) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        axes.scatter(entropies.flatten(), 100 * recalls.flatten(), s=4, alpha=0.4)
        axes.set(
            title=f"seed {seed}, correlation {record['correlation']:.2f}",
            xlabel="entropy, mean of both prompts (nats)",
            ylabel="mean recall (%)",
        )
    with writing(file) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120)
    return True

"""Fills the tables and draws the pictures of docs/evidence.md from the files of results, so that the page holds no
number that no file has."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hf_unigd.evaluation.figures import make_figure
from hf_unigd.outputs import writing

from . import records
from .arms import ARMS, TABLES, Column
from .tables import NOT_RUN, fill_table, load_results, sample


DOCS = Path(__file__).parents[2] / "docs"
PAGE, CURVE = DOCS / "evidence.md", DOCS / "images" / "evidence_mixture.png"
# What stands between these comments is written by this module.
PART = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill_base() -> str:
    """What the base model is, and how often its captions are right."""
    record = records.read(records.RESULTS / "base.json")
    if not record:
        return NOT_RUN
    minutes = f" in {record['minutes']:.0f} minutes" if record["minutes"] else ""
    lines = [
        f"{record['parameters'] / 1e6:.1f} million parameters, {record['steps']} steps of {record['batch_size']} rows"
        f"{minutes}.\n",
        "| captions of unseen pictures | right in | share |",
        "|---|---|---|",
    ]
    for source, shares in record["captions"].items():
        lines += [f"| {source} | {part} | {share:.1%} |" for part, share in shares.items()]
    return "\n".join(lines)


def fill_settings() -> str:
    """Which prompts and which learning rates were tried."""
    prompts = records.read(records.RESULTS / "prompts.json").get("validation", {})
    lines = ["| prompt | R@1 on the validation scenes |", "|---|---|"]
    lines += [f"| {prompt} | {value:.1%} |" for prompt, value in sorted(prompts.items(), key=lambda each: -each[1])]
    tuned = {name: records.read(records.tuning_file(name)).get("validation", {}) for name in ARMS}
    rates = sorted({rate for each in tuned.values() for rate in each}, key=float)
    lines += ["", f"| learning rate | {' | '.join(rates)} |", "|---" * (len(rates) + 1) + "|"]
    for name, each in tuned.items():
        if each:
            cells = (f"{each[rate]:.1%}" if rate in each else NOT_RUN for rate in rates)
            lines.append(f"| {ARMS[name].title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def fill(page: str) -> str:
    """
    The page with all of its parts as the files of results have them.

    Raises:
        KeyError: the page names a part that does not exist.
    """
    parts: dict[str, Callable[[], str]] = {
        "base": fill_base,
        "settings": fill_settings,
        **{name: partial(fill_table, table) for name, table in TABLES.items()},
    }
    return PART.sub(lambda match: f"{match[1]}\n{parts[match[2]]()}\n\n{match[3]}", page)


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
    axes.set(xscale="log", xlabel="perplexity of held-out long captions", ylabel="R@1, mean of both directions (%)")
    axes.legend(title="contrastive : next-token")
    with writing(file) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120)
    return True


def write_report() -> None:
    """Writes the page and its picture."""
    with writing(PAGE) as unfinished:
        unfinished.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw_mixture()

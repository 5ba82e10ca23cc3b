"""Fills the tables and draws the pictures of docs/evidence.md from the files of results, so that the page holds no
number that no file has."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from hf_unigd.evaluation.figures import make_figure
from hf_unigd.outputs import writing

from . import english, records
from .arms import ARMS, TABLES, Column
from .tables import NOT_RUN, SEEDS, fill_table, load_results, sample


DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "evidence.md"
CURVE, ENTROPY = (DOCS / "images" / f"evidence_{name}.png" for name in ("mixture", english.NAME))
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


def fill_prompt_entropy() -> str:
    """How the recall of pairs of prompts goes with the entropy of what follows them."""
    found = load_prompt_entropy()
    if not found:
        return NOT_RUN
    lines = [
        "| seed | captions with right colours, kinds | correlation | VladVA's prompts | the most entropy | the best |",
        "|---|---|---|---|---|---|",
    ]
    for seed, (record, entropies, recalls) in found.items():
        captions = record["projector"]["captions"]
        shares = (recalls[0, 0], recalls.flatten()[entropies.argmax()], recalls.max())
        lines.append(
            f"| {seed} | {captions['colours']:.0%}, {captions['kinds']:.0%} | {record['correlation']:.2f} | "
            + " | ".join(f"{float(share):.1%}" for share in shares)
            + " |"
        )
    return "\n".join(lines)


def load_prompt_entropy() -> dict[int, tuple[dict, torch.Tensor, torch.Tensor]]:
    """By seed the result, and the entropy and the recall of each pair. The first prompts are the model's own, which
    are VladVA's."""
    found = {}
    for seed in SEEDS:
        if record := records.read(records.result_file(english.NAME, seed)):
            image, text = (torch.tensor(list(each.values())) for each in record["entropies"].values())
            found[seed] = record, (image[:, None] + text[None]) / 2, torch.tensor(record["recalls"])
    return found


def draw_prompt_entropy(file: Path = ENTROPY) -> bool:
    """Draws the recall of every pair of prompts over its entropy, if a seed has run."""
    found = load_prompt_entropy()
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


def fill(page: str) -> str:
    """
    The page with all of its parts as the files of results have them.

    Raises:
        KeyError: the page names a part that does not exist.
    """
    parts: dict[str, Callable[[], str]] = {
        "base": fill_base,
        "settings": fill_settings,
        english.NAME: fill_prompt_entropy,
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
    """Writes the page and its pictures."""
    with writing(PAGE) as unfinished:
        unfinished.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw_mixture()
    draw_prompt_entropy()

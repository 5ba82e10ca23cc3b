"""Fills the tables of docs/evidence.md from the files of results: the page holds no number that no file has."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hf_unigd.outputs import writing

from . import english, records
from .arms import ARMS, TABLES
from .pictures import draw_album, draw_captions, draw_mixture, draw_prompt_entropy
from .tables import NOT_MEASURED, NOT_RUN, fill_table, load_results


PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"
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
            cells = (f"{each[rate]:.1%}" if rate in each else NOT_MEASURED for rate in rates)
            lines.append(f"| {ARMS[name].title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def fill_minutes() -> str:
    """How long the runs took."""
    runs = [record["minutes"] for results in load_results(list(ARMS)).values() for record in results.values()]
    if not runs:
        return NOT_RUN
    minutes = [sum(each.values()) for each in runs]
    tried = sum(len(records.read(records.tuning_file(name)).get("validation", {})) for name in ARMS)
    return (
        f"{len(runs)} runs of {min(minutes):.1f} to {max(minutes):.1f} minutes, {sum(minutes) / 60:.1f} hours in all, "
        f"and {tried} more to choose learning rates, which were not timed."
    )


def fill_prompt_entropy() -> str:
    """How the recall of pairs of prompts goes with the entropy of what follows them."""
    found = english.load_results()
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


def fill(page: str) -> str:
    """
    The page with all of its parts as the files of results have them.

    Raises:
        KeyError: the page names a part that does not exist.
    """
    parts: dict[str, Callable[[], str]] = {
        "base": fill_base,
        "minutes": fill_minutes,
        "settings": fill_settings,
        english.NAME: fill_prompt_entropy,
        **{name: partial(fill_table, table) for name, table in TABLES.items()},
    }
    return PART.sub(lambda match: f"{match[1]}\n{parts[match[2]]()}\n\n{match[3]}", page)


def write_report() -> None:
    """Writes the page and its pictures."""
    with writing(PAGE) as unfinished:
        unfinished.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw_captions()
    draw_album()
    draw_mixture()
    draw_prompt_entropy()

"""Pieces of HTML that the page shows. Texts of entries and models are escaped."""

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO
from typing import Any

from ...data.images import open_image


_THUMBNAIL = 384  # pixels of the longer side
_TEXT = 160  # characters of an entry

CSS = """
.unigd-entries {display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .75rem}
.unigd-entries figure {margin: 0; padding: .6rem; border: 1px solid var(--border-color-primary); border-radius: .5rem}
.unigd-entries img {width: 100%; max-height: 12rem; object-fit: contain; background: white; border-radius: .25rem}
.unigd-entries figcaption {overflow-wrap: anywhere}
.unigd-score {font-weight: 600; font-variant-numeric: tabular-nums}
.unigd-problem {border-left: .25rem solid #b91c1c; padding: .5rem .75rem}
.unigd-answer {font-size: 1.15rem; white-space: pre-wrap; overflow-wrap: anywhere}
.unigd-alignment {max-width: 100%; background: white}
.unigd-tokens {width: 100%; border-collapse: collapse}
.unigd-tokens td {border: 0; padding: .15rem .5rem .15rem 0; white-space: nowrap}
.unigd-tokens td:nth-child(2) {width: 100%}
.unigd-tokens div {height: .8rem; background: var(--color-accent); border-radius: .2rem}
"""


def problem(message: str) -> str:
    """What has gone wrong."""
    return f'<p class="unigd-problem" role="alert">{escape(message)}</p>'


def entries(found: Sequence[dict[str, Any]]) -> str:
    """Entries of an index as `/v1/search` returns them, with their images, the best first."""
    if not found:
        return problem("Nothing was found.")
    return f'<div class="unigd-entries">{"".join(map(_entry, found))}</div>'


def answer(text: str, used: Sequence[dict[str, Any]]) -> str:
    """An answer, and the entries that it was made from."""
    said = escape(text) or "<em>The model says nothing.</em>"
    return f'<p class="unigd-answer">{said}</p><p>Made from:</p>{entries(used)}'


def alignment(figure: str, similarity: float) -> str:
    """A heat map, at a data URL, and the similarity of both sequences."""
    return (
        f'<p>Similarity <span class="unigd-score">{similarity:.3f}</span></p>'
        f'<img class="unigd-alignment" alt="Heat map of the alignment" src="{escape(figure)}">'
    )


def tokens(now: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]] | None) -> str:
    """Tokens as bars of their probabilities, and below them those before training, where they are known."""
    if before is None:
        return _bars(now)
    return f"<p>Now:</p>{_bars(now)}<p>Before it was trained:</p>{_bars(before)}"


def _bars(found: Sequence[dict[str, Any]]) -> str:
    most = max(each["probability"] for each in found)
    rows = [
        f"<tr><td><code>{escape(each['token'])}</code></td>"
        f'<td><div style="width: {100 * each["probability"] / most:.1f}%"></div></td>'
        f"<td>{100 * each['probability']:.1f} %</td></tr>"
        for each in found
    ]
    return f'<table class="unigd-tokens">{"".join(rows)}</table>'


def _entry(entry: dict[str, Any]) -> str:
    parts = [*entry["content"], *entry["answer"]]
    pictures = [
        _picture(part["image_url"]["url"]) for part in parts if part["type"] == "image_url" and part["image_url"]
    ]
    text = " ".join(part["text"] for part in parts if part["type"] == "text")
    shown = text if len(text) <= _TEXT else f"{text[:_TEXT]} …"
    return (
        f'<figure>{"".join(pictures)}<figcaption><span class="unigd-score">{entry["score"]:.3f}</span> '
        f"{escape(shown)}<br><small>{escape(str(entry['id']))}</small></figcaption></figure>"
    )


def _picture(url: str) -> str:
    """A small copy, as many large ones would take a phone minutes to load."""
    image = open_image(base64.b64decode(url.partition(",")[2])).convert("RGB")
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = BytesIO()
    image.save(file, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'

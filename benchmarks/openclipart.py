"""Turns OpenClipart, public-domain drawings with titles and keywords, into rows: `python benchmarks/openclipart.py`.

The drawings are those of Debian's package `openclipart-svg`, which needs no root:

    mkdir -p runs/openclipart && cd runs/openclipart
    apt-get download openclipart-svg && dpkg -x openclipart-svg_*.deb .

and the renderer is resvg: `pip install -c constraints.txt resvg-py`. The script writes runs/openclipart/rows, a folder
of `datasets` with the columns `image`, `short_caption` (the title), `long_caption` (the title, the keywords and the
description), `file` and `split`. Drawings that cannot be rendered are named and counted, and so are those without a
title of their own: in this package, a title that many drawings share is the name of a collection.
"""

import argparse
import io
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from PIL import Image
from xxhash import xxh32_intdigest


SVG_FOLDER = "usr/share/openclipart/svg"
DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
SHARED = 5  # drawings that may share a title
# Keywords that say nothing about the drawing: they come from the database that the package was made of.
NOT_WORDS = re.compile(r"hash|unsorted|0x[0-9a-f]+|")
LONGEST = 12  # words of a description
SIDE = 64
TEST_SHARE = 0.1


@dataclass(frozen=True)
class Drawing:
    """A drawing and what its metadata say about it."""

    file: str
    title: str
    keywords: tuple[str, ...]
    description: str

    @property
    def long_caption(self) -> str:
        keywords = f" Keywords: {', '.join(self.keywords)}." if self.keywords else ""
        description = f" {self.description}" if self.description else ""
        return f"{self.title}.{keywords}{description}"


def read_drawing(text: str, file: str) -> Drawing:
    """
    Reads the metadata of an SVG.

    Args:
        text: The SVG.
        file: Its name, which is kept.

    Raises:
        ElementTree.ParseError: it is not XML.
    """
    work = next((each for each in ElementTree.fromstring(text).iter() if each.tag.endswith("}Work")), None)
    if work is None:
        return Drawing(file, "", (), "")
    title = _words(work.findtext(f"{DUBLIN_CORE}title"))
    keywords = [
        _words(each.text)
        for subject in work.findall(f"{DUBLIN_CORE}subject")
        for each in subject.iter()
        if each.tag.endswith("}li")
    ]
    description = " ".join(_words(work.findtext(f"{DUBLIN_CORE}description")).split()[:LONGEST])
    own = sorted({each for each in keywords if not NOT_WORDS.fullmatch(each)})
    return Drawing(file, title, tuple(own), "" if description.rstrip(".") == title else description)


def _words(text: str | None) -> str:
    """A text in small letters, on one line, with spaces for the underscores and dashes between words."""
    return " ".join(re.sub(r"[_\-]+", " ", text or "").lower().split())


def render(text: str, side: int) -> Image.Image:
    """
    Draws an SVG on white, in the middle of a square of `side` pixels, in RGB.

    Raises:
        ValueError: it cannot be drawn.
    """
    from resvg_py import svg_to_bytes

    # Lengths in millimetres and points need the dots per inch.
    drawn = bytes(svg_to_bytes(svg_string=text, width=2 * side, dpi=96, background="#ffffff", skip_system_fonts=True))
    picture = Image.open(io.BytesIO(drawn)).convert("RGB")
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def make_rows(folder: Path, side: int) -> tuple[Dataset, dict[str, list[str]]]:
    """
    Draws all drawings with a title of their own.

    Args:
        folder: The folder with the SVGs.
        side: Side of the pictures, in pixels.

    Returns:
        The rows, and by reason the files that are left out.

    Raises:
        FileNotFoundError: the folder holds no drawings.
    """
    files = sorted(folder.rglob("*.svg"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no SVGs. How to get them: python benchmarks/openclipart.py --help")
    left_out: dict[str, list[str]] = {"not XML": [], "no title of its own": [], "not drawn": [], "drawn before": []}
    drawings: list[tuple[Drawing, str]] = []
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        try:
            drawings.append((read_drawing(text, str(file.relative_to(folder))), text))
        except ElementTree.ParseError:
            left_out["not XML"].append(str(file.relative_to(folder)))
    titles = Counter(drawing.title for drawing, _ in drawings)
    rows: dict[bytes, dict] = {}
    for drawing, text in drawings:
        if not drawing.title or titles[drawing.title] > SHARED:
            left_out["no title of its own"].append(drawing.file)
            continue
        try:
            picture = render(text, side)
        except ValueError as error:
            left_out["not drawn"].append(f"{drawing.file} ({error})")
            continue
        if picture.tobytes() in rows:
            left_out["drawn before"].append(drawing.file)
            continue
        rows[picture.tobytes()] = {
            "image": picture,
            "short_caption": drawing.title,
            "long_caption": drawing.long_caption,
            "file": drawing.file,
            "split": "test" if _is_held_out(drawing.title) else "train",
        }
    return Dataset.from_list(list(rows.values())), left_out


def _is_held_out(title: str) -> bool:
    """Drawings of one title are in one split, whatever other drawings there are."""
    return xxh32_intdigest(title.encode()) < TEST_SHARE * 2**32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/openclipart"), help="where the package is unpacked")
    parser.add_argument("--side", type=int, default=SIDE, help="side of the pictures, in pixels")
    arguments = parser.parse_args()
    rows, left_out = make_rows(arguments.folder / SVG_FOLDER, arguments.side)
    rows.save_to_disk(arguments.folder / "rows")
    print(f"{len(rows)} rows, of which {list(rows['split']).count('test')} are held out: {arguments.folder / 'rows'}")
    for reason, files in left_out.items():
        print(f"left out, {reason}: {len(files)}")
    for reason in ("not XML", "not drawn"):
        for file in left_out[reason]:
            print(f"  {reason}: {file}")


if __name__ == "__main__":
    main()

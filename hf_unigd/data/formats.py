"""The accepted row formats: their columns, and what the columns hold."""

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


logger = logging.getLogger(__name__)

# sentence-transformers numbers its columns of negatives, others write them in the plural or say that they are hard.
_NEGATIVE = re.compile(r"(hard_?)?neg(ative)?(?P<plural>s?)(_?\d+)?")

_NO_PAIR_LABELS = "every pair must be a match; keep those that are, and remove the column"
_ONE_ANSWER = "only the answers in the chat are learned; remove the column"
_NO_TOOLS = "tools are not supported; remove the column, or the rows that need it"

# WebDataset names a field by the suffix of its file, img2dataset writes Parquet columns of the same names, and the
# captions of an image folder's `metadata.jsonl` are called `text` in the documentation of `datasets`.
_CAPTION_ALIASES = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp"), "image"),
    **dict.fromkeys(("txt", "text"), "caption"),
}


@dataclass(frozen=True)
class RowFormat:
    """
    A row format.

    Attributes:
        name: The name by which [`RowParser`] finds its parser.
        columns: What each column holds: `"chat"` (a list of turns with `role` and `content`), `"chats"` (a list of
            chats, or a single one), `"turns"` (LLaVA's, with `from` and `value`), `"image"`, `"images"` (a list, or a
            single image), `"image lists"` (a list for each of several chats), `"image infos"` (MMC4's), `"text"`,
            `"texts"` (a text, or a list to draw from), `"sentences"` (a list of texts), `"weights"` (of such a list),
            or `"sequence"` (a text, an image, or a list of both).
        required: Sets of columns, of which a row has at least one.
        aliases: Other names of its columns, which files and tools give them.
        bare: Sets of columns that are enough where nothing is learned, as in an index.
        negatives: Whether columns of negatives ([`is_negative`]) belong to it, which hold a `"sequence"`, or in the
            plural a list of them.
        refused: Columns that change the meaning of a row in a way that is not supported, with the reasons.
        summary: The line of it in error messages.
    """

    name: str
    columns: Mapping[str, str]
    required: tuple[frozenset[str], ...]
    summary: tuple[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    bare: tuple[frozenset[str], ...] = ()
    negatives: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)

    def fits(self, columns: Collection[str], requires_match: bool = True) -> bool:
        """Whether a row with these columns has the format."""
        sets = self.required if requires_match else (*self.required, *self.bare)
        names = {self.aliases.get(column, column) for column in columns}
        return any(needed <= names for needed in sets)

    def uses(self, column: str) -> bool:
        known = column in self.columns or column in self.aliases
        return known or (self.negatives and is_negative(column))

    def under_own_names(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """
        The row with the names of `columns` instead of their aliases.

        Raises:
            ValueError: two names of a column hold different content. The message continues "Row 3 ...".
        """
        named: dict[str, Any] = {}
        given: dict[str, str] = {}
        for name, value in row.items():
            own = self.aliases.get(name, name)
            if own in named and not _same_text(named[own], value):
                raise ValueError(
                    f"has `{given[own]}` and `{name}`, which are names of the same column, with different content; "
                    "remove one of them"
                )
            named.setdefault(own, value)
            given.setdefault(own, name)
        return named


# In this order: the first that fits is the format of a row.
FORMATS = (
    RowFormat(
        "chat",
        columns={
            "messages": "chat",
            "images": "images",
            "image": "images",
            "positive_messages": "chats",
            "positive_images": "image lists",
            "negative_messages": "chats",
            "negative_images": "image lists",
        },
        required=(frozenset({"messages"}),),
        refused={
            **dict.fromkeys(("label", "labels", "score", "scores"), _NO_PAIR_LABELS),
            **dict.fromkeys(("rejected_messages", "rejected_response", "rejected_images"), _ONE_ANSWER),
            **dict.fromkeys(("prompt", "completion", "chosen", "rejected"), _ONE_ANSWER),
            "tools": _NO_TOOLS,
            "system": "the system's text belongs into a turn of `messages` with that role",
        },
        summary=(
            "messages [+ images or image] [+ positive_messages] [+ negative_messages]",
            "chat, ms-swift's and TRL's columns",
        ),
    ),
    RowFormat(
        "llava",
        columns={"conversations": "turns", "image": "images", "images": "images"},
        required=(frozenset({"conversations"}),),
        refused={"tools": _NO_TOOLS, "system": "the system's text belongs into a turn of `conversations`"},
        summary=("conversations [+ image or images]", "LLaVA's columns"),
    ),
    RowFormat(
        "mmc4",
        columns={"text_list": "sentences", "image_info": "image infos"},
        required=(frozenset({"text_list", "image_info"}),),
        summary=("text_list, image_info", "MMC4's columns: one sequence, each image before its sentence"),
    ),
    RowFormat(
        "mmeb",
        columns={
            "qry": "text",
            "qry_image_path": "image",
            "pos_text": "text",
            "pos_image_path": "image",
            "neg_text": "texts",
            "neg_image_path": "images",
        },
        required=tuple(
            frozenset({query, positive})
            for query in ("qry", "qry_image_path")
            for positive in ("pos_text", "pos_image_path")
        ),
        bare=(frozenset({"qry"}), frozenset({"qry_image_path"})),
        summary=(
            "qry, qry_image_path, pos_text, pos_image_path [, neg_text, neg_image_path]",
            "MMEB-train's columns, in which an empty text is none",
        ),
    ),
    RowFormat(
        "pair",
        columns={"anchor": "sequence", "positive": "sequence"},
        required=(frozenset({"anchor", "positive"}),),
        bare=(frozenset({"anchor"}),),
        negatives=True,
        refused=dict.fromkeys(("label", "labels", "score", "scores"), _NO_PAIR_LABELS),
        summary=("anchor, positive [, negative, negative_1, ... or negatives]", "sentence-transformers' columns"),
    ),
    RowFormat(
        "captions",
        columns={
            "image": "image",
            "short_caption": "texts",
            "long_caption": "texts",
            "caption": "texts",
            "caption_weights": "weights",
        },
        required=tuple(frozenset({"image", name}) for name in ("short_caption", "long_caption", "caption")),
        aliases=_CAPTION_ALIASES,
        bare=(frozenset({"image"}),),
        negatives=True,
        summary=(
            "image, caption, or short_caption and/or long_caption [, negative, ...]",
            "captions to contrast and to predict, by their length or by their column; also jpg, txt",
        ),
    ),
)

# Columns of all formats: the instructions of what is embedded, the anchor, and its matches and negatives.
INSTRUCTIONS = ("instruction", "document_instruction")
# Columns that say which rows show one image, and which caption is which. Evaluation alone reads them.
IMAGE_ID, CAPTION_ID = "image_id", "caption_id"
_REFUSED = dict.fromkeys(
    ("video", "videos", "audio", "audios"), "only images and texts are supported; remove the column, or these rows"
)

ACCEPTED = "\n".join(f"  {columns:<75} {use}" for columns, use in (each.summary for each in FORMATS))
ACCEPTED += "\nEach may have `instruction` and `document_instruction`, for the anchor and for its matches."


def is_negative(column: str) -> bool:
    """Whether a column holds negatives: `negative`, `negative_1`, `hard_negative`, `neg`, `negatives`, ..."""
    return _NEGATIVE.fullmatch(column) is not None


def _same_text(a: Any, b: Any) -> bool:
    """Whether both are the same text, as img2dataset writes a caption into two columns."""
    return isinstance(a, str) and isinstance(b, str) and a.strip() == b.strip()


def holds_many(column: str) -> bool:
    """Whether the column of negatives has a name in the plural, and with it a list."""
    found = _NEGATIVE.fullmatch(column)
    return found is not None and bool(found["plural"])


def check_columns(columns: Iterable[str], requires_match: bool = True, kept: Collection[str] = ()) -> None:
    """Checks that a dataset has the columns of an accepted row format, and logs those that are not used.

    Rows may leave columns of the dataset empty, so that one dataset holds rows of several formats.

    Args:
        columns: Column names of the dataset.
        requires_match: Whether rows need a match, a caption or an answer; if not, `anchor` or `image` alone is enough.
        kept: Columns that are used, whether or not they belong to a format.

    Raises:
        ValueError: the columns fit no accepted format. The message names them.
    """
    columns = list(columns)
    if not any(each.fits(columns, requires_match) for each in FORMATS):
        raise ValueError(
            f"No accepted row format has the columns {sorted(columns)}. Rename them (`--rename_columns`) to one of:\n"
            + ACCEPTED
        )
    unused = [name for name in columns if name not in kept and not is_of_format(name)]
    if unused:
        logger.warning("Columns that are not used: %s.", ", ".join(unused))


def is_of_format(column: str) -> bool:
    """Whether a row format has a column of this name."""
    known = {name for each in FORMATS for name in (*each.columns, *each.aliases, *each.refused)}
    return (
        column in known or column in (*INSTRUCTIONS, IMAGE_ID, CAPTION_ID) or column in _REFUSED or is_negative(column)
    )


def format_of(row: Mapping[str, object], requires_match: bool = True) -> RowFormat:
    """The format of a row, in which every column that holds content is used.

    Args:
        row: The columns of the row that are not None.
        requires_match: Whether the row needs a match, a caption or an answer.

    Raises:
        ValueError: no format fits, or a column does not belong to it. The message continues "Row 3 ...".
    """
    found = next((each for each in FORMATS if each.fits(row, requires_match)), None)
    if found is None:
        raise ValueError(f"has no usable columns, only {sorted(row)}. The accepted formats are:\n{ACCEPTED}")
    for name, value in row.items():
        if isinstance(value, (str, list, tuple)) and not value:
            continue
        reason = {**_REFUSED, **found.refused}.get(name)
        if reason is not None:
            raise ValueError(f"has the column `{name}`, but {reason}")
        belongs_elsewhere = is_negative(name) or any(each.uses(name) for each in FORMATS)
        if belongs_elsewhere and not found.uses(name):
            own = {found.aliases.get(column, column): column for column in row}
            needed = next(each for each in (*found.required, *found.bare) if each <= own.keys())
            main = " and ".join(f"`{own[column]}`" for column in sorted(needed))
            raise ValueError(
                f"has the column `{name}`, which does not go with {main}; remove one of them, or set it to None in "
                "this row"
            )
    return found

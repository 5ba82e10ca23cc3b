"""Reads the rows of published data sets whose columns are their own: MMC4 and MMEB."""

from typing import Any

from .chats import as_list


# Stands for the image of a text in MMEB, whatever the image token of the model is.
MMEB_IMAGE_TAG = "<|image_1|>"


def from_mmc4(row: dict[str, Any]) -> list[dict[str, Any]]:
    """
    An article of MMC4 as the messages of one user's turn, with each image before the sentence that it is matched to.
    Images of the same sentence keep their order.

    Args:
        row: `text_list`, the sentences, and `image_info`, dicts with `image_name` and `matched_text_index`
            (https://github.com/allenai/mmc4). `image_name` may also hold the image itself.

    Raises:
        ValueError: a column has another form. The message continues "Row 3 ...".
    """
    texts = row["text_list"]
    if not isinstance(texts, (list, tuple)) or not texts:
        raise ValueError("has a `text_list` that is not a list of at least one text")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("has an empty text in `text_list`")
    images: list[list[dict[str, Any]]] = [[] for _ in texts]
    for info in as_list(row["image_info"]):
        if not isinstance(info, dict) or info.get("image_name") is None:
            raise ValueError("has an entry in `image_info` without an `image_name`")
        place = info.get("matched_text_index")
        if not isinstance(place, int) or not 0 <= place < len(texts):
            raise ValueError(
                f"has an image in `image_info` with the `matched_text_index` {place!r}, but `text_list` has "
                f"{len(texts)} texts, counted from 0"
            )
        images[place].append({"type": "image", "image": info["image_name"]})
    parts = [part for place, text in enumerate(texts) for part in (*images[place], {"type": "text", "text": text})]
    return [{"role": "user", "content": parts}]


def from_mmeb(row: dict[str, Any]) -> dict[str, Any]:
    """
    A row of MMEB-train as `anchor`, `positive` and `negatives`: lists of texts and images.

    The instruction is the beginning of a text, and the image stands at its tag, or first where the text has none. A
    tag without an image, as the queries of WebQA have, stands for nothing. Negatives may come in lists, as the rows
    with mined negatives have them; entries without text and image are none.

    Args:
        row: `qry`, `qry_image_path`, `pos_text`, `pos_image_path`, `neg_text` and `neg_image_path`
            (https://huggingface.co/datasets/TIGER-Lab/MMEB-train). What is missing is empty or None.

    Raises:
        ValueError: the query or the positive is empty, a text has several tags or is none, or there are not as many
            texts as images of negatives. The message continues "Row 3 ...".
    """
    pair: dict[str, Any] = {}
    for name, text, image in (("anchor", "qry", "qry_image_path"), ("positive", "pos_text", "pos_image_path")):
        parts = _mmeb_parts(row.get(text), row.get(image), text)
        if parts:
            pair[name] = parts
        elif text in row or image in row:
            raise ValueError(f"has neither a text nor an image in `{text}` and `{image}`")
    texts, images = as_list(row.get("neg_text")), as_list(row.get("neg_image_path"))
    if texts and images and len(texts) != len(images):
        raise ValueError(
            f"has {len(texts)} texts in `neg_text`, but {len(images)} images in `neg_image_path`; an empty text or "
            "path stands for what a negative lacks"
        )
    count = max(len(texts), len(images))
    negatives = [
        _mmeb_parts(text, image, "neg_text")
        for text, image in zip(texts or [None] * count, images or [None] * count, strict=True)
    ]
    pair["negatives"] = [parts for parts in negatives if parts]
    return pair


def _mmeb_parts(text: Any, image: Any, name: str) -> list[Any]:
    """The text and the image in their order, with paths as `{"path": ...}`, so that they are not texts."""
    if text is not None and not isinstance(text, str):
        raise ValueError(f"has a `{name}` of type {type(text).__name__}, but a text is needed")
    before, *after = (text or "").split(MMEB_IMAGE_TAG)
    if len(after) > 1:
        raise ValueError(f"has {len(after)} tags {MMEB_IMAGE_TAG} in `{name}`, but there is one image at most")
    images = [] if image is None or image == "" else [{"path": image} if isinstance(image, str) else image]
    parts = [before.strip(), *images, *(piece.strip() for piece in after)] if after else [*images, before.strip()]
    return [part for part in parts if not isinstance(part, str) or part]

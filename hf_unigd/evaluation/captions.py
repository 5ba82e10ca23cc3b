"""Captions that a model generates, compared with those that people wrote."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from .asking import ask
from .benchmark_data import BenchmarkData
from .embedders import Embedder
from .scores import Outcome, Scores


def caption_words(text: str) -> str:
    """
    The words of a caption, in lower case and without punctuation, with spaces between them: those of NLTK's Penn
    Treebank tokenizer. CIDEr's own is that of Stanford CoreNLP, which needs Java. The words of a caption of one
    sentence are mostly the same; brackets, and full stops that another sentence follows, are not.

    Raises:
        ImportError: pycocoevalcap or NLTK is not installed.
    """
    tokenizer, punctuation, _ = _packages()
    return " ".join(word for word in tokenizer.tokenize(text.lower()) if word not in punctuation)


def cider(said: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """
    CIDEr-D (Vedantam et al., CVPR 2015) of captions, by the package pycocoevalcap, which lmms-eval uses too. It weighs
    n-grams by how rare they are among the references of all images, so that a score belongs to the images that it was
    computed on. The words are those of [`caption_words`]: a value is near a published one, and not comparable with it
    in its last digits.

    Args:
        said: The caption of each image.
        references: The captions that people wrote, of each image.

    Returns:
        `np.ndarray` of shape `(len(said),)`, float64: the score of each image, from 0 to 10. Papers report the mean
        in percent.

    Raises:
        ImportError: pycocoevalcap or NLTK is not installed.
        ValueError: there are fewer than two images, so that no n-gram is rare.
    """
    if len(said) < 2:
        raise ValueError(f"CIDEr compares the captions of at least two images, and there are {len(said)}.")
    written = {place: [caption_words(text) for text in texts] for place, texts in enumerate(references)}
    _, _, scorer = _packages()
    _, scores = scorer.compute_score(written, {place: [caption_words(text)] for place, text in enumerate(said)})
    return np.asarray(scores, dtype=np.float64)


def _packages() -> tuple[Any, list[str], Any]:
    """The tokenizer, the punctuation that it leaves out, and what scores captions."""
    try:
        from nltk.tokenize import NLTKWordTokenizer
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS
    except ImportError as error:
        raise ImportError("CIDEr needs pycocoevalcap and NLTK: `pip install 'hf-unigd[evaluation]'`.") from error
    return NLTKWordTokenizer(), PUNCTUATIONS, Cider()


def caption_generation(
    embedder: Embedder,
    data: BenchmarkData,
    show_progress: bool = False,
    *,
    instruction: str,
    answer_tokens: int = 64,
) -> Outcome:
    """
    Captions of images: `cider`, the mean of [`cider`] over all images. Rows have `image` and `captions`.

    Args:
        embedder: The model.
        data: The rows.
        show_progress: Whether to draw a progress bar.
        instruction: What follows the image.
        answer_tokens: Longest caption, in tokens.

    Raises:
        CannotMeasureError: the model does not generate.
        ImportError: what measures captions is not installed.
        ValueError: a row has no caption, or there are fewer than two.
    """
    _packages()  # before the work, to see whether they are installed
    rows = range(len(data.rows))
    references = [data.rows[number]["captions"] for number in rows]
    if without := [number for number in rows if not references[number]]:
        raise ValueError(f"Row {without[0]} has no caption.")

    def question(number: int) -> list:
        return [data.open(number, "image"), instruction]

    said = ask(embedder, [partial(question, number) for number in rows], show_progress, answer_tokens)
    counts = {
        "images": len(said),
        "references": sum(map(len, references)),
        "without_an_answer": sum(not text.strip() for text in said),
    }
    return {"cider": Scores(cider(said, references))}, counts

"""What an answer that a model gives is worth."""

import re
from collections.abc import Callable, Mapping
from string import ascii_uppercase
from typing import Any, TypeAlias


# The score of an answer, between 0 and 1, to the question of a row.
Measure: TypeAlias = Callable[[str, Mapping[str, Any]], float]

_ARTICLES = {"a", "an", "the"}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
_VOTES = 3


def yes_or_no(answer: str) -> str | None:
    """The first of both words in an answer, if there is one."""
    found = re.search(r"\b(yes|no)\b", answer.lower())
    return found and found.group()


def plain(answer: str) -> str:
    """An answer as VQA compares it: in lower case, without articles, apostrophes and punctuation, and with numbers up
    to ten as digits."""
    text = re.sub(r"['’]", "", answer.lower())
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"\.(?!\d)", "", text)
    text = re.sub(r"[;/\[\]\"{}()=+\\_\-<>@`,?!]", " ", text)
    return " ".join(_NUMBERS.get(word, word) for word in text.split() if word not in _ARTICLES)


def choice_accuracy() -> Measure:
    """ScienceQA: whether the first single capital letter that names one of the `choices` is that of `answer`, a
    number. An answer without a letter is wrong."""

    def score(said: str, row: Mapping[str, Any]) -> float:
        letters = ascii_uppercase[: len(row["choices"])]
        found = re.search(rf"\b[{letters}]\b", said)
        return float(found is not None and letters.index(found.group()) == row["answer"])

    return score


def vqa_accuracy() -> Measure:
    """
    The accuracy of VQA and VizWiz (Antol et al., ICCV 2015): of the people whose `answers` are known, each is left out
    once, and an answer that three of the others gave counts 1, that of two 2/3, and that of one 1/3; the mean of it.

    Texts are compared as the official code does ([`plain`]), but for its table of contractions, in place of which
    apostrophes are removed on both sides.
    """

    def score(said: str, row: Mapping[str, Any]) -> float:
        given = [plain(answer) for answer in row["answers"]]
        same = given.count(plain(said))
        # Those who gave the answer see one vote less when they are left out.
        total = same * min(same - 1, _VOTES) + (len(given) - same) * min(same, _VOTES)
        return total / (_VOTES * len(given))

    return score


def rouge_l() -> Measure:
    """
    The F-measure of ROUGE-L (Lin, 2004) of the best of the reference `answers`, by the package rouge-score, without
    stemming.

    Raises:
        ImportError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE-L needs rouge-score: `pip install 'hf-unigd[evaluation]'`.") from error
    scorer = RougeScorer(["rougeL"])

    def score(said: str, row: Mapping[str, Any]) -> float:
        return scorer.score_multi(row["answers"], said)["rougeL"].fmeasure

    return score


def nearest_choice() -> Measure:
    """
    DEMON: whether the one of the `choices` that is nearest to an answer is that of `answer`, a number: the equal one,
    or else by the cosine of TF-IDF vectors over the answer and the choices. Words of one letter count, so that
    "Image A" and "Image B" differ. An answer without a word of any choice is wrong.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise ImportError("TF-IDF needs scikit-learn: `pip install 'hf-unigd[evaluation]'`.") from error

    def score(said: str, row: Mapping[str, Any]) -> float:
        answer, *choices = map(plain, (said, *row["choices"]))
        if answer in choices:
            return float(choices.index(answer) == row["answer"])
        if not answer:
            return 0.0
        vectors = TfidfVectorizer(token_pattern=r"\S+").fit_transform([answer, *choices])
        similarities = (vectors[1:] @ vectors[0].T).toarray().ravel()
        return float(similarities.max() > 0 and similarities.argmax() == row["answer"])

    return score


MEASURES: dict[str, Callable[[], Measure]] = {
    "choice_accuracy": choice_accuracy,
    "vqa_accuracy": vqa_accuracy,
    "rouge_l": rouge_l,
    "nearest_choice": nearest_choice,
}

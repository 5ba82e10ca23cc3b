"""Captions that a model generates: CIDEr by hand, and the words that it compares."""

import shutil
from math import exp, sqrt

import numpy as np
import pytest

import benchmark_files
from evaluation_cases import HashEmbedder, Speaker
from hf_unigd.evaluation.benchmark_data import BenchmarkData, read_benchmark
from hf_unigd.evaluation.benchmarking import run_benchmark
from hf_unigd.evaluation.benchmarks import load_benchmarks
from hf_unigd.evaluation.captions import caption_generation, caption_words, cider
from hf_unigd.evaluation.embedders import CannotMeasureError
from hf_unigd.evaluation.matches import ImageSettings
from hf_unigd.evaluation.results import ResultsFile


def test_cider_by_hand():
    """All n-grams are in the references of one of two images, and so of equal weight. Of sentences of two words there
    are no n-grams of three and four, whose similarity is 0: ten times a fourth of those of one and of two words."""
    references = [["Red cat."], ["blue dog"]]
    right, half = cider(["red cat", "Red dog!"], references)
    assert right == pytest.approx(10 * (1 + 1) / 4)
    assert half == pytest.approx(10 * (1 / 2 + 0) / 4)  # one word of two
    # Twice the words: counts are clipped at the reference's, and three pairs in place of one cost a length penalty.
    repeated, _ = cider(["red cat red cat", ""], references)
    assert repeated == pytest.approx(10 * (2 / (sqrt(8) * sqrt(2)) + 1 / sqrt(5)) / 4 * exp(-(2**2) / (2 * 6**2)))
    # Of several references, the mean counts.
    mean, nothing = cider(["red cat", ""], [["red cat", "red star"], ["blue dog"]])
    assert 10 * (1 / 2) / 4 < mean < 10 * (1 + 1) / 4 and nothing == 0
    with pytest.raises(ValueError, match="at least two images, and there are 1"):
        cider(["a"], [["a"]])


CAPTIONS = [
    "A man's red-and-white hat isn't new.",
    "He can't, cannot won't do it; it's 10% off",
    "A pizza with olives, cheese, and ham!",
    "three people's bikes' wheels",
    'A sign that says "STOP" at 5:30',
]


def test_words_are_in_lower_case_and_without_punctuation():
    assert caption_words(CAPTIONS[0]) == "a man 's red-and-white hat is n't new"
    assert caption_words(CAPTIONS[2]) == "a pizza with olives cheese and ham"


@pytest.mark.skipif(shutil.which("java") is None, reason="CoreNLP's tokenizer needs Java")
def test_words_are_those_of_corenlp():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    expected = PTBTokenizer().tokenize({place: [{"caption": text}] for place, text in enumerate(CAPTIONS)})
    assert [[caption_words(text)] for text in CAPTIONS] == list(expected.values())


@pytest.mark.parametrize("name", ["flickr30k_captions", "nocaps_captions"])
def test_a_model_that_says_a_reference_scores_more_than_one_that_says_another_images(name, tmp_path):
    benchmark_files.write_all(tmp_path)
    benchmark = load_benchmarks()[name]

    def measured(answers):
        embedder = Speaker(answers)
        file = ResultsFile(None, embedder.description, [])
        return embedder, run_benchmark(embedder, benchmark, tmp_path, file, show_progress=False)

    references = [row["captions"] for row in read_benchmark(benchmark, tmp_path).rows]
    said = [texts[0] for texts in references]
    embedder, right = measured(said)
    assert right.metrics["cider"] == pytest.approx(cider(said, references).mean())
    assert right.counts["images"] == len(references) and right.counts["references"] == sum(map(len, references))
    assert all("Provide a one-sentence caption" in question for question in embedder.asked)
    _, wrong = measured(said[1:] + said[:1])
    assert wrong.metrics["cider"] < right.metrics["cider"]
    np.testing.assert_allclose(right.scores["cider"].values.mean(), right.metrics["cider"])


def test_what_cannot_be_captioned_is_refused():
    rows = [{"image": "a.png", "captions": ["a cat"]}, {"image": "b.png", "captions": []}]
    data = BenchmarkData(rows, ImageSettings(), {})
    with pytest.raises(ValueError, match="Row 1 has no caption"):
        caption_generation(Speaker([]), data, instruction="Say it.")
    with pytest.raises(CannotMeasureError, match="does not generate"):
        caption_generation(HashEmbedder(), BenchmarkData(rows[:1], ImageSettings(), {}), instruction="Say it.")

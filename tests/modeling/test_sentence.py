"""What sentence-transformers' inputs are, and the limit of their lengths."""

import pytest
import torch
from sentence_transformers import SentenceTransformer

from hf_unigd.modeling.sentence_unigd import UniGDSentenceModule
from tiny_models import make_image


A = make_image(1)


@pytest.fixture
def sentences(llava):
    return SentenceTransformer(modules=[UniGDSentenceModule(*llava)], device="cpu")


def is_embedded_as(sentences, value, sequence):
    module = sentences[0]
    with torch.no_grad():
        expected = module.model.embed(**module.processor.process_sequences([sequence]))
    return torch.allclose(sentences.encode([value], convert_to_tensor=True), expected, atol=1e-6)


def test_the_name_of_a_modality_says_what_a_string_is(sentences, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    A.save("a.png")
    assert is_embedded_as(sentences, "a.png", [A])
    assert is_embedded_as(sentences, "a red cat", ["a red cat"])
    assert is_embedded_as(sentences, {"text": "a.png"}, ["a.png"])
    assert is_embedded_as(sentences, {"image": "a.png", "text": "what is it"}, [A, "what is it"])
    chat = [{"role": "user", "content": [{"type": "text", "text": "a.png"}, {"type": "image", "image": "a.png"}]}]
    assert is_embedded_as(sentences, chat, [{"role": "user", "content": ["a.png", A]}])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"image": "hello"}, "An input has a missing image: there is no file hello"),
        ({"image": 3}, "a int as its 'image'"),
        ({"text": A}, "a Image as its 'text'"),
        ({"audio": "a.wav"}, "'audio' is not supported"),
        ({}, "only 'text' and 'image'"),
        ("https://localhost/a.png", "is not fetched"),
        (3, "An input is a int"),
    ],
)
def test_other_inputs_are_refused(sentences, value, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sentences.encode([value])


def test_max_seq_length_is_honoured(sentences):
    assert sentences.max_seq_length == sentences[0].model.config.context_length
    sentences.encode(["red " * 40, "a"])
    sentences.max_seq_length = 30
    with pytest.raises(ValueError, match=r"The input 'red red red .* has \d+ tokens.*`max_length=30`"):
        sentences.encode(["a", "red " * 40])
    assert sentences.encode(["a"]).shape == (1, 32)


def test_every_door_has_the_limit_of_the_context(llava):
    model, processor = llava
    inputs = processor.process_sequences(["a", "red " * 2000])
    with pytest.raises(ValueError, match=r"Row 1 has \d+ tokens, more than the 1024 of the model's context"):
        model.embed(**inputs)
    with pytest.raises(ValueError, match=r"The input 'red"):
        SentenceTransformer(modules=[UniGDSentenceModule(model, processor)], device="cpu").encode(["red " * 2000])

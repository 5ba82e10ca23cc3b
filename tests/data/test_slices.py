"""Splitting sequences into slices."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_unigd import UniGDProcessor
from hf_unigd.data.example import IMAGE, TEXT
from hf_unigd.data.slices import SentenceSplitter, slices_of
from tiny_models import make_image, make_vlm


@given(st.text())
def test_no_character_of_a_text_is_lost(text):
    sentences = SentenceSplitter().split(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence.strip() for sentence in sentences)


def test_the_splitter_knows_abbreviations_and_other_scripts():
    assert SentenceSplitter().split("Dr. Smith ate 3.5 apples! Why?\nNobody knows.") == [
        "Dr. Smith ate 3.5 apples!",
        "Why?",
        "Nobody knows.",
    ]
    assert SentenceSplitter("zh").split("他去了。我不知道。") == ["他去了。", "我不知道。"]


def user(*parts):
    return {
        "role": "user",
        "content": [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in parts
        ],
    }


SEQUENCES = {
    "text alone": ([user("One. Two.")], None, [TEXT, TEXT]),
    "image alone": ([user(make_image(1))], None, [IMAGE]),
    "captioned image": ([user(make_image(1))], "A red cat. It sleeps.", [IMAGE, TEXT, TEXT]),
    "story": ([user("One.", make_image(1), "Two. Three.", make_image(2))], None, [TEXT, IMAGE, TEXT, TEXT, IMAGE]),
    "chat": (
        [
            {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
            user(make_image(1), "What is it?"),
            {"role": "assistant", "content": [{"type": "text", "text": "A cat. Red."}]},
            user("Sure?"),
        ],
        "Yes.",
        [IMAGE, TEXT, TEXT, TEXT, TEXT, TEXT],
    ),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_slices_and_the_processors_spans_agree(name):
    messages, target, modalities = SEQUENCES[name]
    splitter = SentenceSplitter()
    assert [part.modality for part in slices_of(messages, target, splitter)] == modalities
    processor = UniGDProcessor(make_vlm("llava").processor)
    batch = processor.process_sequences([messages], [target], sentence_ends=splitter)
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    found = [IMAGE if batch["input_ids"][0, start] == image_id else TEXT for _, start, _ in batch["slice_spans"]]
    assert found == modalities


def test_a_sequence_without_slices_raises():
    with pytest.raises(ValueError, match="no slices"):
        slices_of([{"role": "system", "content": [{"type": "text", "text": "Be kind."}]}], None, SentenceSplitter())

"""The text of tokens that come one by one, against decoding them all at once."""

from hypothesis import given
from hypothesis import strategies as st

from hf_unigd.serving.text_stream import StreamedText
from tiny_models import make_tokenizer


TOKENIZER = make_tokenizer(["<image>"], bos="<s>").backend_tokenizer
TEXT = "Two blue dogs on the grass: ünï, 日本, 🐕‍🦺."


def streamed(tokens, stops=()):
    """The pieces of a text, and how many tokens it took."""
    text, pieces = StreamedText(TOKENIZER, stops), []
    for count, token in enumerate(tokens, 1):
        pieces.append(text.add(token))
        if text.has_stopped:
            return [*pieces, text.end()], count
    return [*pieces, text.end()], len(tokens)


@given(st.text(alphabet="ab <>é日🐕", max_size=20), st.integers(0, 3))
def test_the_pieces_are_the_whole_text(text, left_out):
    tokens = TOKENIZER.encode(text, add_special_tokens=False).ids
    tokens = tokens[: len(tokens) - left_out]  # perhaps in the middle of a character
    pieces, _ = streamed([0, *tokens, 1])  # special tokens are left out
    assert "".join(pieces) == TOKENIZER.decode(tokens)


def test_text_is_given_when_it_comes():
    tokens = TOKENIZER.encode(TEXT, add_special_tokens=False).ids
    pieces, _ = streamed(tokens)
    assert sum(map(bool, pieces)) > len(TEXT) / 3
    assert "\ufffd" not in "".join(pieces)


@given(st.text(alphabet="abc", max_size=12), st.lists(st.text(alphabet="abc", min_size=1, max_size=3), max_size=3))
def test_it_ends_before_the_first_stop(text, stops):
    tokens = TOKENIZER.encode(text, add_special_tokens=False).ids
    pieces, count = streamed(tokens, stops)
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    # Tokens may hold what is behind a stop; what comes first in the text counts.
    ends = [text[:place] for place in places]
    assert "".join(pieces) in ends if ends else "".join(pieces) == text
    if ends:
        read = TOKENIZER.decode(tokens[:count])
        assert any(stop in read for stop in stops)
        assert not any(stop in TOKENIZER.decode(tokens[: count - 1]) for stop in stops)
        assert "".join(pieces) == min(ends, key=len) or len(tokens) > count

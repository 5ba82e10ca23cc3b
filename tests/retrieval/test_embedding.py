"""Embedding many sequences."""

import pytest
import torch

from hf_unigd.modeling import SequenceError
from hf_unigd.retrieval import embed_sequences
from tiny_models import make_image


SEQUENCES = ["a red cat", [make_image(1)], ["two", make_image(2)], "a blue dog", [make_image(3)]]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_embeddings_are_in_order_whatever_the_batch(llava, batch_size):
    model, processor = llava
    expected = torch.cat([model.embed(**processor.process_sequences([sequence])) for sequence in SEQUENCES])
    embeddings = embed_sequences(model, processor, SEQUENCES, batch_size, show_progress=False)
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=0)


def test_nothing_to_embed_is_an_error(llava):
    with pytest.raises(ValueError, match="nothing to embed"):
        embed_sequences(*llava, [])


def test_a_sequence_beyond_the_context_is_refused(llava):
    with pytest.raises(SequenceError, match=r"Sequence 1 has .* more than `max_length=1024`"):
        embed_sequences(*llava, ["cat", "cat " * 1100], show_progress=False)

"""Many sequences at once: in their order, and each as it is alone."""

import pytest
import torch

from hf_unigd.bulk.sequences import embed_sequences
from hf_unigd.modeling import SequenceError
from tiny_models import make_image


def test_embeddings_are_those_of_each_sequence_alone_and_padding_is_spared(llava, monkeypatch):
    model, processor = llava
    monkeypatch.setattr("hf_unigd.bulk.sequences.WINDOW", 3)  # 14 sequences: more than one window of batches
    sequences = ["a cat " * (1 + place * 5 % 9) if place % 3 else [make_image(place)] for place in range(14)]
    alone = torch.cat([model.embed(**processor.process_sequences([sequence])) for sequence in sequences])
    widths = []
    process = processor.process_sequences
    monkeypatch.setattr(
        processor, "process_sequences", lambda *args, **kwargs: widths.append(process(*args, **kwargs)) or widths[-1]
    )
    together = embed_sequences(model, processor, sequences, batch_size=3, show_progress=False)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    spared = sum(batch["attention_mask"].numel() for batch in widths)
    in_order = [process(sequences[start : start + 3])["attention_mask"].numel() for start in range(0, 14, 3)]
    assert spared < 0.95 * sum(in_order)


def test_a_bad_sequence_is_named_by_its_own_place(llava):
    with pytest.raises(SequenceError, match="Sequence 5 holds an empty text") as error:
        embed_sequences(*llava, ["a long text about a cat", *["a"] * 4, " "], batch_size=2, show_progress=False)
    assert error.value.index == 5

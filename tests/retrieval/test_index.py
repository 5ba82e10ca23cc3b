"""Embedding many sequences, and searching among them."""

import pytest
import torch
from datasets import Dataset

from hf_unigd.retrieval import EmbeddingIndex, embed_sequences
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


def test_an_index_finds_its_own_rows_after_saving(llava, tmp_path):
    embeddings = embed_sequences(*llava, SEQUENCES, show_progress=False)
    rows = Dataset.from_dict({"row": range(5), "text": list("abcde"), "embedding": embeddings.tolist()})
    EmbeddingIndex(rows, "some/model").save(tmp_path / "index")
    index = EmbeddingIndex.load(tmp_path / "index")
    assert index.model == "some/model"
    hits = index.search(embeddings, k=3)
    assert [found[0][1]["row"] for found in hits] == [0, 1, 2, 3, 4]
    for found in hits:
        scores = [score for score, _ in found]
        assert scores[0] == pytest.approx(1, abs=1e-5) and scores == sorted(scores, reverse=True)
        assert "embedding" not in found[0][1]


def test_bad_searches_say_why(tmp_path):
    index = EmbeddingIndex(Dataset.from_dict({"row": [0, 1], "embedding": torch.eye(2).tolist()}), "m")
    with pytest.raises(ValueError, match="number of rows in the index, 2"):
        index.search(torch.eye(2), k=3)
    with pytest.raises(ValueError, match="width 3, but the index holds vectors of 2"):
        index.search(torch.eye(3), k=1)
    with pytest.raises(ValueError, match="holds no index"):
        EmbeddingIndex.load(tmp_path)

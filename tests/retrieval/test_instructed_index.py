"""An index embeds its documents and its queries with their instructions, as in training."""

import pytest
import torch

from hf_unigd.retrieval import EmbeddingIndex, answer_with_retrieval, embed_sequences
from index_cases import build, knowledge, questions
from tiny_instructions import embed, make_model


def test_an_index_embeds_documents_and_queries_with_theirs(tmp_path):
    model = make_model()
    both = model, model.processor
    rows = knowledge().add_column("instruction", [None, None, None, None, "Only here."])
    index = build(both, tmp_path, rows)
    plain = questions()
    documents = torch.cat(
        [embed(model, plain[:4], prompt_name="document"), embed(model, plain[4:], instruction="Only here.")]
    )
    entries = sorted(index.table._table.to_arrow().to_pylist(), key=lambda entry: entry["row"])
    torch.testing.assert_close(torch.tensor([entry["embedding"] for entry in entries]), documents, atol=1e-5, rtol=0)
    assert not any("Summarize the car." in entry["text"] for entry in entries)
    for given, name in (({}, {"prompt_name": "query"}), ({"instruction": "Find it."}, {"instruction": "Find it."})):
        (hits,) = index.search(*both, ["a cat"], k=5, **given)
        expected = (embed(model, ["a cat"], **name) @ documents.T)[0].sort(descending=True).values
        assert [hit.score for hit in hits] == pytest.approx(expected.tolist(), abs=1e-5)
    (answer,) = answer_with_retrieval(*both, index, ["a cat"], k=1, max_new_tokens=1, instruction="Find it.")
    assert answer.hits[0].row == hits[0].row

    model.processor.instructions["query"] = "Find another."  # an index is of documents
    EmbeddingIndex.load(tmp_path).search(*both, ["a cat"])
    model.processor.instructions["document"] = "Another."
    with pytest.raises(ValueError, match=r"the instruction 'Summarize the car.' of documents, and .* 'Another.'"):
        EmbeddingIndex.load(tmp_path).search(*both, ["a cat"])
    torch.testing.assert_close(
        embed_sequences(*both, ["a cat"], prompt_name="colours", show_progress=False),
        embed(model, ["a cat"], prompt_name="colours"),
    )

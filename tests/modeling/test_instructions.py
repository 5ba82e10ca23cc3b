"""Instructions of a processor: where they stand, that they are saved, and what is refused."""

import pytest
import torch

from hf_unigd import UniGDProcessor
from hf_unigd.modeling import SequenceError
from hf_unigd.modeling.probe_unigd import make_probe, processor_differences
from tiny_instructions import INSTRUCTIONS, SYSTEM, A, B, make_model
from tiny_models import FAMILIES, make_vlm


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sequence", ["a cat", A, ["red", A, "green", B], [A, "red"]])
def test_an_instruction_is_the_first_text_of_the_users_turn(family, sequence):
    processor = UniGDProcessor(make_vlm(family).processor, instructions=INSTRUCTIONS)
    parts = sequence if isinstance(sequence, list) else [sequence]
    written = processor.process_sequences([["Find the dog.", *parts]])
    for given in ({"prompt_name": "query"}, {"instruction": " Find the dog."}, {"instruction": ["Find the dog."]}):
        instructed = processor.process_sequences([sequence], **given)
        assert torch.equal(instructed["input_ids"], written["input_ids"])
        assert torch.equal(instructed["spans"], written["spans"])
    chat = [SYSTEM, {"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}]
    chat.append({"role": "user", "content": "and"})
    written = [chat[0], {"role": "user", "content": ["Find the dog.", *parts]}, *chat[2:]]
    ids = [
        processor.process_sequences([each], instruction=text)["input_ids"]
        for each, text in ((chat, "Find the dog."), (written, None))
    ]
    assert torch.equal(*ids)


def test_soft_prompts_stay_at_the_end():
    processor = make_model().processor
    text = processor.tokenizer.decode(processor.process_sequences([[A, "a cat"]], prompt_name="query")["input_ids"][0])
    assert text.index("Find the dog.") < text.index("<image>") < text.index("a cat") < text.index("<|unigd_image_0|>")


def test_an_instruction_is_not_a_slice():
    processor = UniGDProcessor(make_vlm("llava").processor, embedding_position="last_slice", instructions=INSTRUCTIONS)

    def ends(text):
        return [place + 1 for place, character in enumerate(text) if character == "."]

    plain, instructed = (
        processor.process_sequences([["Red. Two dogs.", A]], prompt_name=name, sentence_ends=ends)
        for name in (None, "query")
    )
    longer = instructed["input_ids"].shape[1] - plain["input_ids"].shape[1]
    assert longer > 0
    for name in ("slice_spans", "spans"):
        assert torch.equal(instructed[name], plain[name] + torch.tensor([0, longer, longer]))


def test_only_what_is_embedded_has_an_instruction():
    processor = UniGDProcessor(make_vlm("llava").processor, instructions=INSTRUCTIONS)
    batch = processor.process_sequences(
        ["a cat", "a dog"], prompted=[True, False], prompt_name="query", padding_side="right"
    )
    plain = processor.process_sequences(["a dog"], prompted=False)["input_ids"][0]
    assert torch.equal(batch["input_ids"][1, : len(plain)], plain)
    with pytest.raises(ValueError, match=r"with `prompted=False` nothing is"):
        processor.process_sequences(["a dog"], prompted=False, prompt_name="query")


def test_what_is_wrong_is_said():
    vlm_processor = make_vlm("llava").processor
    processor = UniGDProcessor(vlm_processor)
    assert processor.get_instruction("query") is None
    plain, named = (processor.process_sequences(["a"], prompt_name=name) for name in (None, "document"))
    assert torch.equal(plain["input_ids"], named["input_ids"])
    with pytest.raises(ValueError, match=r"no instruction 'colours'. The processor knows 'query', 'document'"):
        processor.process_sequences(["a"], prompt_name="colours")
    with pytest.raises(ValueError, match="`prompt_name` or `instruction`, not both"):
        processor.process_sequences(["a"], prompt_name="query", instruction="b")
    with pytest.raises(ValueError, match="2 sequences, but 1 values of `instruction`"):
        processor.process_sequences(["a", "b"], instruction=["c"])
    with pytest.raises(SequenceError, match=r"Sequence 0 .*reserved token '<image>'"):
        processor.process_sequences(["a"], instruction="find <image>")
    with pytest.raises(SequenceError, match="Sequence 0 is empty"):
        processor.process_sequences([[]], instruction="find")
    with pytest.raises(ValueError, match="The instruction 'query' holds the reserved token '<image>'"):
        UniGDProcessor(vlm_processor, instructions={"query": "find <image>"})
    with pytest.raises(ValueError, match="none that is empty; got 'query': ' '"):
        UniGDProcessor(vlm_processor, instructions={"query": " "})


def test_they_are_saved_and_known_to_the_probe(tmp_path):
    make_model().processor.save_pretrained(tmp_path)
    processor = UniGDProcessor.from_pretrained(tmp_path)
    assert processor.instructions == INSTRUCTIONS
    model = make_model()
    probe = make_probe(model, processor)
    assert probe["embeddings"].shape[0] == 3 + len(INSTRUCTIONS) and processor_differences(processor, probe) == []
    for changed in ({}, {**INSTRUCTIONS, "query": "Find the cat."}):
        processor.instructions = changed
        assert processor_differences(processor, probe)

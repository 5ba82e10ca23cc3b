"""The small CLIP reads its texts to their end."""

import torch

from hf_unigd.quickstart.small_clip import CONTEXT_LENGTH, build_clip
from hf_unigd.quickstart.small_llava import build_processor


TEXTS = ["there is a zebra", "there is a zebra in a red house", "there is a zebra in a red car"]


@torch.no_grad()
def test_a_text_is_embedded_where_it_ends():
    vlm_processor = build_processor(TEXTS * 20, image_size=24)
    tokens = len(vlm_processor.tokenizer)
    model, processor = build_clip(vlm_processor, hidden_size=32, layers=1)
    assert len(vlm_processor.tokenizer) == tokens and vlm_processor.tokenizer.eos_token == "</s>"  # its own is kept

    inputs = processor.tokenizer(TEXTS, padding=True, return_tensors="pt")
    end = processor.tokenizer.eos_token_id
    assert end == tokens and ((inputs["input_ids"] == end).sum(1) == 1).all()
    found = model.text_model(**inputs)
    last = inputs["attention_mask"].sum(1) - 1
    assert torch.equal(found.pooler_output, found.last_hidden_state[range(3), last])
    assert torch.cdist(found.pooler_output, found.pooler_output)[~torch.eye(3, dtype=torch.bool)].min() > 1e-3

    long = processor.tokenizer([" zebra" * 100], truncation=True)["input_ids"][0]
    assert len(long) == CONTEXT_LENGTH and long[-1] == end

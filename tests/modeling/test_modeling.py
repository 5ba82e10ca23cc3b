"""The model against its own backbone, for every family."""

import copy

import pytest
import torch

from hf_unigd import UniGDConfig, UniGDForConditionalGeneration, UniGDModel, UniGDProcessor
from hf_unigd.modeling.head_unigd import last_token_spans, pool_spans
from hf_unigd.modeling.modeling_unigd import next_token_loss
from tiny_models import FAMILIES, make_image, make_vlm


SEQUENCES = [
    [make_image(1)],
    "a red cat",
    ["two blue dogs", make_image(2, (40, 20)), "and", make_image(3)],
]


def make(family, **kwargs):
    tiny = make_vlm(family)
    return UniGDForConditionalGeneration.from_vlm(tiny.model, **kwargs), UniGDProcessor(tiny.processor), tiny.model


def without_spans(batch):
    return {name: value for name, value in batch.items() if name != "spans"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_logits_are_bit_equal_to_the_backbones(family, padding_side):
    model, processor, backbone = make(family)
    batch = processor.process_sequences(SEQUENCES, ["a cat", None, "the grass"], padding_side=padding_side)
    ours, theirs = model(**batch), backbone(**without_spans(batch))
    assert torch.equal(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.loss, theirs.loss)
    del batch["labels"]
    kept = model(**batch, logits_to_keep=2).logits
    assert torch.equal(kept, backbone(**without_spans(batch), logits_to_keep=2).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_is_token_equal_to_the_backbones(family):
    model, processor, backbone = make(family)
    batch = processor.process_sequences(SEQUENCES, padding_side="left")
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    ours = model.generate(**batch, **settings)
    theirs = backbone.generate(**without_spans(batch), **settings)
    assert torch.equal(ours, theirs)
    assert ours.shape[1] == batch["input_ids"].shape[1] + 12


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_depend_on_nothing_but_their_sequence(family):
    """Neither padding side, nor batch composition, nor what follows the span changes an embedding."""
    model, processor, _ = make(family, head_type="mlp", embedding_dim=16)
    alone = torch.cat([model.embed(**processor.process_sequences([sequence])) for sequence in SEQUENCES])
    for padding_side in ("left", "right"):
        batch = processor.process_sequences(SEQUENCES, padding_side=padding_side)
        torch.testing.assert_close(model.embed(**batch), alone, atol=1e-5, rtol=0)
        followed = processor.process_sequences(
            SEQUENCES, ["a large car", None, "people waving from the window"], padding_side=padding_side
        )
        torch.testing.assert_close(model.embed(**followed), alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(3))
    assert (alone[0] - alone[2]).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_spans_are_means_of_last_hidden_states(family):
    model, processor, backbone = make(family)
    batch = processor.process_sequences(SEQUENCES)
    batch["spans"] = torch.tensor([[2, 1, 5], [0, 0, 7], [2, 3, 4]])
    hidden = backbone.base_model(**without_spans(batch)).last_hidden_state
    expected = torch.stack([hidden[2, 1:5].mean(0), hidden[0, 0:7].mean(0), hidden[2, 3]])
    torch.testing.assert_close(model.embed(**batch), torch.nn.functional.normalize(expected, dim=-1))


def test_the_default_span_is_the_last_attended_token_under_any_padding():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]])
    assert last_token_spans(mask).tolist() == [[0, 2, 3], [1, 3, 4], [2, 3, 4], [3, 2, 3]]


def test_pooling_no_spans_gives_no_embeddings():
    assert pool_spans(torch.randn(2, 3, 4), torch.empty(0, 3, dtype=torch.long)).shape == (0, 4)


def test_padding_content_never_reaches_an_embedding():
    hidden = torch.randn(2, 5, 4)
    spans = torch.tensor([[0, 0, 3], [1, 4, 5]])
    expected = pool_spans(hidden, spans)
    hidden[0, 3:] = torch.nan
    assert torch.equal(pool_spans(hidden, spans), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_implementations_agree_and_reach_the_backbone(family, attention, tmp_path):
    model, processor, _ = make(family)
    batch = processor.process_sequences(SEQUENCES)
    expected = model.embed(**batch)
    model.save_pretrained(tmp_path)
    loaded = UniGDForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=attention)
    assert loaded.vlm.config.get_text_config()._attn_implementation == attention
    torch.testing.assert_close(loaded.embed(**batch), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_keeps_head_and_temperature_in_float32(family, tmp_path):
    model, processor, _ = make(family, head_type="linear", embedding_dim=8)
    model.save_pretrained(tmp_path)
    half = UniGDForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.vlm.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in half.embedding_head.parameters()} == {torch.float32}
    batch = processor.process_sequences(SEQUENCES)
    embeddings = half.embed(**batch)
    assert embeddings.dtype == torch.float32
    assert (embeddings * model.embed(**batch)).sum(-1).min() > 0.98


@pytest.mark.parametrize("head_type", ["none", "linear", "mlp"])
def test_a_head_that_was_cast_is_computed_in_float32(head_type):
    """As DeepSpeed and FSDP cast it."""
    size = {} if head_type == "none" else {"embedding_dim": 8}
    model, processor, _ = make("llava", head_type=head_type, **size)
    model.to(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    batch = processor.process_sequences(SEQUENCES)
    outputs = model(**batch, output_hidden_states=True)
    hidden = outputs.hidden_states[-1].double()
    pooled = torch.stack([hidden[row, start:end].mean(0) for row, start, end in batch["spans"].tolist()])
    expected = torch.nn.functional.normalize(copy.deepcopy(model.embedding_head.projection).double()(pooled), dim=-1)
    torch.testing.assert_close(outputs.embeddings.double(), expected, atol=1e-6, rtol=0)
    expected = model.embedding_head.logit_scale.double().exp().squeeze()
    torch.testing.assert_close(outputs.inverse_temperature.double(), expected, atol=0, rtol=1e-6)


def test_the_head_is_float32_under_autocast(llava):
    model, processor = llava
    batch = processor.process_sequences(SEQUENCES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.embed(**batch).dtype == torch.float32


def test_compiled_embedding_gives_the_same_vectors(llava):
    model, processor = llava
    batch = processor.process_sequences(SEQUENCES)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model.embed)(**batch), model.embed(**batch), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_vl", "gemma3"])
def test_the_output_of_the_tower_replaces_the_pixels(family):
    tiny = make_vlm(family)
    model, processor = UniGDForConditionalGeneration.from_vlm(tiny.model), UniGDProcessor(tiny.processor)
    batch = processor.process_sequences(
        [[make_image(1)], "a cat", ["see", make_image(2), "there"]], ["one", None, "two"]
    )
    expected = model(**batch)
    features = model.image_features(**batch)
    del batch["pixel_values"]
    outputs = model(**batch, image_features=features)
    assert torch.equal(outputs.embeddings, expected.embeddings) and torch.equal(outputs.loss, expected.loss)


def test_next_token_loss_meets_the_head_at_labelled_positions_only():
    torch.manual_seed(0)
    hidden = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(4, 9, bias=False, dtype=torch.float64)
    targets = torch.full((2, 6), -100)
    targets[0, 3:5], targets[1, 1] = torch.tensor([2, 7]), 8
    seen = []
    head.register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape[0]))
    loss = next_token_loss(hidden, targets, head, 9)
    assert seen == [3]
    expected = torch.nn.functional.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(next_token_loss(hidden, targets, head, 9, num_items_in_batch=6), loss / 2)
    assert next_token_loss(hidden, torch.full((2, 6), -100), head, 9).item() == 0


def test_logits_are_skipped_in_training_with_labels(llava):
    model, processor = llava
    batch = processor.process_sequences(["a red cat"], ["a dog"])
    assert model.train()(**batch).logits is None
    assert model(**batch, skip_logits=False).logits is not None
    assert model.eval()(**batch).logits is not None


def test_matryoshka_prefixes_are_unit_vectors_and_others_are_refused():
    model, processor, _ = make("llava", head_type="linear", embedding_dim=16, matryoshka_dims=[8, 4])
    assert model.config.matryoshka_dims == [4, 8, 16]
    batch = processor.process_sequences(SEQUENCES)
    short = model.embed(**batch, truncate_dim=4)
    expected = torch.nn.functional.normalize(model.embed(**batch)[:, :4], dim=-1)
    assert torch.equal(short, expected)
    with pytest.raises(ValueError, match=r"`truncate_dim=5` was not trained.* the sizes \[4, 8, 16\]"):
        model.embed(**batch, truncate_dim=5)


def test_the_full_size_is_always_trained(llava, tmp_path):
    config = UniGDConfig(make_vlm("llava").model.config, head_type="linear", embedding_dim=16, matryoshka_dims=[8, 4])
    assert config.matryoshka_dims == [4, 8, 16]
    config.save_pretrained(tmp_path)
    assert UniGDConfig.from_pretrained(tmp_path).matryoshka_dims == [4, 8, 16]
    model, processor = llava  # without `matryoshka_dims`
    batch, size = processor.process_sequences(SEQUENCES), model.config.embedding_dim
    torch.testing.assert_close(model.embed(**batch, truncate_dim=size), model.embed(**batch))
    with pytest.raises(ValueError, match=rf"the sizes \[{size}\]"):
        model.embed(**batch, truncate_dim=size - 1)


def test_temperature_is_clamped(llava):
    model, _ = llava
    model.embedding_head.logit_scale.data.fill_(9.0)
    model.clamp_logit_scale_()
    assert model.embedding_head.logit_scale.exp().item() == pytest.approx(100)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"head_type": "deep"}, "`head_type` must be one of 'none', 'linear', 'mlp', got 'deep'"),
        ({"embedding_dim": 7}, "needs a head"),
        ({"head_type": "linear", "embedding_dim": 0}, "positive integer"),
        ({"head_type": "linear", "head_hidden_dim": 4}, "head_hidden_dim"),
        ({"head_type": "linear", "embedding_dim": 8, "matryoshka_dims": [16]}, "matryoshka_dims"),
    ],
)
def test_bad_configs_fail_at_construction(kwargs, message):
    with pytest.raises(ValueError, match=message):
        UniGDConfig(vlm_config=make_vlm("llava").model.config, **kwargs)


def test_encoder_decoders_are_refused():
    with pytest.raises(ValueError, match="encoder-decoder"):
        UniGDConfig(vlm_config={"model_type": "florence2"})


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])  # an untied and a tied output embedding
def test_soft_prompts_start_as_the_hand_written_prompt(family):
    model, processor, _ = make(family)
    before = model.embed(**processor.process_sequences(SEQUENCES))
    text = processor.process_sequences(["a red cat"])
    hard_ids = text["input_ids"]
    vocab_size = model.get_input_embeddings().num_embeddings
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    spare = list(range(len(processor.tokenizer), vocab_size))  # rows that no token uses yet
    generated = model.generate(**text, **settings, suppress_tokens=spare)

    model.add_soft_prompts(**processor.add_soft_prompts())
    soft = processor.process_sequences(["a red cat"])
    assert not set(processor.soft_prompt_ids) & set(hard_ids.flatten().tolist())
    assert set(processor.soft_prompt_ids) & set(soft["input_ids"].flatten().tolist())
    torch.testing.assert_close(model.embed(**processor.process_sequences(SEQUENCES)), before, atol=1e-5, rtol=0)
    # The same words as before, never a reserved token, although tied rows are copies of them.
    assert torch.equal(model.generate(**text, **settings), generated)
    assert model.get_input_embeddings().num_embeddings == max(vocab_size, max(processor.soft_prompt_ids) + 1)
    with pytest.raises(ValueError, match="already"):
        processor.add_soft_prompts()


def test_models_without_a_language_modelling_head_are_refused():
    with pytest.raises(ValueError, match="no language-modelling head"):
        UniGDModel.from_vlm(make_vlm("llava").model.model)

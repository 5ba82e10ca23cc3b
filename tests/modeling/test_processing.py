"""Sequences to model inputs: order, spans, labels, and refusals."""

import json
import string
from datetime import datetime

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.modeling import SequenceError
from tiny_models import CORPUS, FAMILIES, make_image, make_vlm


@pytest.fixture(scope="module", params=FAMILIES)
def processor(request):
    return UniGDProcessor(make_vlm(request.param).processor)


def test_images_keep_their_number_and_place(processor):
    """Although chat templates such as LLaVA's put all images first."""
    batch = processor.process_sequences([["red", make_image(1), "green", make_image(2), make_image(3), "blue"]])
    text = processor.tokenizer.decode(batch["input_ids"][0])
    image_token = processor.vlm_processor.image_token
    pieces = [piece for piece in text.replace("\n", "").split(image_token) if piece]
    order = [word for piece in pieces for word in ("red", "green", "blue") if word in piece]
    assert order == ["red", "green", "blue"]
    assert text.index("red") < text.index(image_token) < text.index("green") < text.rindex(image_token)
    assert text.rindex(image_token) < text.index("blue") < text.index("Summarize the provided image")


def test_the_span_is_the_last_token_before_the_answer(processor):
    for padding_side in ("left", "right"):
        batch = processor.process_sequences(["a cat", [make_image(1)]], ["two dogs", None], padding_side=padding_side)
        for row, start, end in batch["spans"].tolist():
            assert end == start + 1
            ids, labels = batch["input_ids"][row], batch["labels"][row]
            attended = batch["attention_mask"][row].nonzero().flatten()
            labelled = (labels != -100).nonzero().flatten()
            if row == 0:
                assert labelled[0] == end
                assert labelled[-1] == attended[-1]
                answer = processor.tokenizer.decode(ids[labelled])
                assert answer.strip() == f"two dogs{processor.tokenizer.eos_token}"
                assert torch.equal(ids[labelled], labels[labelled])
            else:
                assert len(labelled) == 0
                assert attended[-1] == start


def test_prompt_tokens_are_the_same_with_and_without_a_target(processor):
    sequence = ["red", make_image(1)]
    alone = processor.process_sequences([sequence])["input_ids"][0]
    with_target = processor.process_sequences([sequence], ["a green car"])["input_ids"][0]
    assert torch.equal(with_target[: len(alone)], alone)


def test_unprompted_sequences_have_no_span_and_no_prompt(processor):
    batch = processor.process_sequences(["a cat", "a dog"], ["yes", "no"], prompted=[False, True])
    assert batch["spans"][:, 0].tolist() == [1]
    assert "Summarize" not in processor.tokenizer.decode(batch["input_ids"][0])


def test_conversations_keep_their_roles(processor):
    chat = [
        {"role": "user", "content": [{"type": "image", "image": make_image(1)}, {"type": "text", "text": "red"}]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "and green"},
    ]
    text = processor.tokenizer.decode(processor.process_sequences([chat])["input_ids"][0])
    assert text.index("red") < text.index("a cat") < text.index("and green") < text.index("Summarize")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.lists(st.sampled_from("ti"), min_size=1, max_size=4), min_size=1, max_size=4),
    targets=st.lists(st.booleans(), min_size=4, max_size=4),
    left=st.booleans(),
)
def test_any_mixture_makes_consistent_batches(processor, kinds, targets, left):
    sequences = [["a red cat" if kind == "t" else make_image(1) for kind in row] for row in kinds]
    wanted = ["two dogs" if targets[place] else None for place in range(len(kinds))]
    batch = processor.process_sequences(sequences, wanted, padding_side="left" if left else "right")
    assert batch["spans"][:, 0].tolist() == list(range(len(kinds)))
    for row, _start, end in batch["spans"].tolist():
        assert batch["attention_mask"][row, end - 1] == 1
        if wanted[row]:
            assert batch["labels"][row, end] != -100
    image_tokens = (batch["input_ids"] == processor.vlm_processor.image_token_id).any(1)
    assert image_tokens.tolist() == ["i" in row for row in kinds]


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ([], "is empty"),
        ("", "empty text"),
        (["a cat", "  "], "empty text"),
        ([{"role": "user", "content": []}], "empty turn"),
        ([{"role": "assistant", "content": "hi"}], "must end with the user's turn"),
        ([3], "holds a int"),
        (["see <image>", make_image(1)], "reserved token '<image>' inside a text"),
        (["the end</s>"], "reserved token '</s>'"),
        ([{"role": "user", "content": [{"type": "video", "video": "cat.mp4"}]}], "holds a video"),
    ],
)
def test_bad_sequences_name_their_place(sequence, message):
    processor = UniGDProcessor(make_vlm("llava").processor)
    with pytest.raises(SequenceError, match=f"Sequence 1 .*{message}") as error:
        processor.process_sequences(["a cat", sequence])
    assert error.value.index == 1


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="`sequences` is empty"):
        UniGDProcessor(make_vlm("llava").processor).process_sequences([])


def test_rows_longer_than_max_length_are_refused_not_cut(processor):
    with pytest.raises(SequenceError, match=r"Sequence 1 has .* more than `max_length=40`"):
        processor.process_sequences(["a cat", "a red cat " * 30], max_length=40)
    with pytest.raises(SequenceError, match="of them the target"):
        processor.process_sequences(["a cat", "a dog"], [None, "the green grass " * 30], max_length=40)
    with pytest.raises(SequenceError, match="empty target"):
        processor.process_sequences(["a cat"], [" "])


def test_construction_refuses_what_cannot_work():
    plain = make_vlm("llava").processor
    with pytest.raises(ValueError, match="prompts"):
        UniGDProcessor(plain, prompts={"sound": "hm"})
    plain.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="padding token"):
        UniGDProcessor(plain)
    plain = make_vlm("llava").processor
    plain.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        UniGDProcessor(plain)


def test_it_behaves_like_the_backbones_processor(processor):
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "red"}]}], add_generation_prompt=True
    )
    ours = processor(images=[make_image(1)], text=[prompt], return_tensors="pt")
    theirs = processor.vlm_processor(images=[make_image(1)], text=[prompt], return_tensors="pt")
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert processor.batch_decode(ours["input_ids"]) == processor.vlm_processor.batch_decode(theirs["input_ids"])


def sentence_ends(text):
    """Every full stop ends a sentence, and so does the end of the text."""
    return sorted({place + 1 for place, character in enumerate(text) if character == "."} | {len(text)})


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_slice_spans_hold_images_and_ends_of_sentences(processor, padding_side):
    sequence = [make_image(1), make_image(2), "Red. Two blue dogs on grass.", make_image(3), "Green."]
    batch = processor.process_sequences(
        [sequence, "One cat."], ["A car. Yellow.", None], sentence_ends=sentence_ends, padding_side=padding_side
    )
    image_id = processor.tokenizer.convert_tokens_to_ids(processor.vlm_processor.image_token)
    texts = []
    for row, start, end in batch["slice_spans"].tolist():
        ids = batch["input_ids"][row]
        if ids[start] == image_id:
            assert (ids[start:end] == image_id).all()
            assert ids[start - 1] != image_id
            assert ids[end] != image_id
            texts.append("image")
        else:
            assert end == start + 1
            texts.append(processor.tokenizer.decode(ids[:end])[-6:])
    ends = ["Red.", "grass.", "Green.", "car.", "llow.", "cat."]
    expected = ["image", "image", *ends[:2], "image", *ends[2:]]
    assert [text[-len(end) :] for text, end in zip(texts, expected, strict=True)] == expected
    assert batch["slice_spans"][:, 0].tolist() == [0] * 8 + [1]


def test_the_last_slice_is_what_is_embedded_without_a_prompt(processor):
    plain = UniGDProcessor(processor.vlm_processor, embedding_position="last_slice")
    sequences = ["Red. Blue", ["A cat.", make_image(1)], [make_image(2), "green"]]
    batch = plain.process_sequences(
        sequences, [None, "A dog.", None], padding_side="left", sentence_ends=sentence_ends
    )
    assert "Summarize" not in plain.tokenizer.decode(batch["input_ids"][0])
    spans = batch["spans"].tolist()
    text = plain.tokenizer.decode(batch["input_ids"][0][: spans[0][2]])
    assert text.endswith("Blue")
    by_row = [[span for span in batch["slice_spans"].tolist() if span[0] == row] for row in range(3)]
    assert spans[1] == by_row[1][1]  # the image, which the target's sentence follows
    assert spans[1][2] - spans[1][1] > 1
    assert by_row[1][2][1] > spans[1][2]


def test_the_last_token_of_an_image_can_stand_for_it(processor):
    last = UniGDProcessor(processor.vlm_processor, embedding_position="last_slice", image_pooling="last")
    mean = UniGDProcessor(processor.vlm_processor, embedding_position="last_slice")
    one, whole = (each.process_sequences([[make_image(1)]])["spans"][0] for each in (last, mean))
    assert one.tolist() == [0, whole[2] - 1, whole[2]]
    assert whole[2] - whole[1] > 1


def test_an_unknown_choice_is_refused():
    vlm_processor = make_vlm("llava").processor
    with pytest.raises(ValueError, match="`embedding_position` must be one of 'prompt', 'last_slice', got 'first'"):
        UniGDProcessor(vlm_processor, embedding_position="first")
    with pytest.raises(ValueError, match="`image_pooling` must be one of 'mean', 'last', got 'max'"):
        UniGDProcessor(vlm_processor, image_pooling="max")


def test_the_settings_survive_saving(processor, tmp_path):
    UniGDProcessor(processor.vlm_processor, embedding_position="last_slice", image_pooling="last").save_pretrained(
        tmp_path
    )
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    assert settings["embedding_position"] == "last_slice"
    assert settings["image_pooling"] == "last"


@pytest.mark.parametrize("after_role", [" ", "\n"])
def test_an_answer_follows_the_prompt_whatever_white_space_the_template_puts_before_it(after_role):
    """LLaVA-OneVision's template ends a role with a space, and with a line break where an answer is wanted. An older
    one has line breaks."""
    plain = make_vlm("llava_onevision").processor
    plain.chat_template = plain.chat_template.replace("m['role'] + ' '", f"m['role'] + {after_role!r}")
    plain.chat_template = plain.chat_template.replace("'\n' + c['text']", "c['text']")
    processor = UniGDProcessor(plain)
    batch = processor.process_sequences([[make_image(1), "red"]], ["a cat"])
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert text.endswith("<|im_start|>assistant\na cat<|im_end|>")
    labelled = batch["labels"][0] != -100
    assert processor.tokenizer.decode(batch["input_ids"][0][labelled]) == "a cat<|im_end|>"


def test_a_template_that_changes_the_conversation_with_its_answer_is_refused():
    plain = make_vlm("qwen2_vl").processor
    plain.chat_template = "{{ messages | length }}" + plain.chat_template
    with pytest.raises(ValueError, match="renders a conversation differently once it is answered"):
        UniGDProcessor(plain).process_sequences(["red"], ["a cat"])


def test_what_a_template_refuses_names_the_sequence():
    plain = make_vlm("qwen2_vl").processor
    plain.chat_template = (
        "{% if messages | length > 2 %}{{ raise_exception('too many turns') }}{% endif %}" + plain.chat_template
    )
    turns = [{"role": role, "content": "red"} for role in ("user", "assistant", "user")]
    with pytest.raises(SequenceError, match="Sequence 1 is refused by the chat template: too many turns"):
        UniGDProcessor(plain).process_sequences(["red", turns])


def test_the_date_of_a_template_is_frozen(tmp_path, caplog):
    processor = UniGDProcessor(make_vlm("mistral3").processor)
    today = f"{datetime.now():%Y-%m-%d}"
    assert f"It is replaced by today's, {today}" in caplog.text
    assert "strftime_now" not in processor.chat_template
    assert today in processor.tokenizer.decode(processor.process_sequences(["red"])["input_ids"][0])
    computed = make_vlm("mistral3").processor
    computed.chat_template = "{% set form = '%Y' %}{{ strftime_now(form) }}" + computed.chat_template
    with pytest.raises(ValueError, match="in a format that it computes"):
        UniGDProcessor(computed)


@pytest.mark.parametrize("text", ["<video>", "<|im_end|>", "<|unigd_image_0|>", "<pad>"])
def test_reserved_tokens_are_refused_in_sequences_and_targets(text):
    processor = UniGDProcessor(make_vlm("llava_onevision").processor)
    processor.add_soft_prompts()
    with pytest.raises(SequenceError, match=f"reserved token {text!r} inside a text".replace("|", r"\|")):
        processor.process_sequences([f"a {text} cat"])
    with pytest.raises(SequenceError, match=f"reserved token {text!r} inside a target".replace("|", r"\|")):
        processor.process_sequences(["a cat"], [f"a {text} cat"])
    assert processor.find_reserved("a <b>cat</b>") is None


def test_videos_are_refused(llava):
    model, processor = llava
    with pytest.raises(ValueError, match="Videos are not supported"):
        model.generate(input_ids=torch.ones(1, 2, dtype=torch.long), pixel_values_videos=torch.zeros(1))
    with pytest.raises(ValueError, match="`videos` are not supported"):
        processor(text=["red"], videos=[[make_image(1)]])
    with pytest.raises(ValueError, match="The conversation holds a video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}])
    with pytest.raises(ValueError, match="Videos are not supported, but the inputs hold `pixel_values_videos`"):
        model.embed(input_ids=torch.ones(1, 2, dtype=torch.long), pixel_values_videos=torch.zeros(1))


@pytest.mark.parametrize("family", ["smolvlm", "llava_next", "pixtral", "ovis2"])
def test_spans_tell_neighbouring_images_apart(family):
    processor = UniGDProcessor(make_vlm(family).processor)
    given = [make_image(1, (24, 20)), make_image(2, (20, 44)), "Red.", make_image(3, (44, 20))]
    batch = processor.process_sequences([given], sentence_ends=sentence_ends, image_lengths=True)
    patches = batch["input_ids"][0] == processor._tokenize.patch_id
    spans = [span for span in batch["slice_spans"].tolist() if patches[span[1]]]
    assert [int(patches[start:end].sum()) for _, start, end in spans] == batch["image_lengths"].tolist()
    alone = [processor.process_sequences([[part]])["input_ids"] for part in (given[0], given[1], given[3])]
    assert batch["image_lengths"].tolist() == [int((ids == processor._tokenize.patch_id).sum()) for ids in alone]
    assert all(patches[start] and patches[end - 1] for _, start, end in spans)
    assert sum(batch["image_lengths"].tolist()) == patches.sum()
    assert len(spans) == 3 and spans[0][2] <= spans[1][1]


def test_the_slice_of_a_text_that_ends_with_several_tokens_of_one_character_ends_at_the_last():
    processor = UniGDProcessor(make_vlm("qwen2_vl").processor, embedding_position="last_slice")
    batch = processor.process_sequences(["a cat 🐈"])
    _, start, end = batch["spans"][0].tolist()
    assert end == start + 1
    assert processor.tokenizer.decode(batch["input_ids"][0][:end]).endswith("a cat 🐈")


def make_sentencepiece_tokenizer(prepend_scheme):
    """A tokenizer that tokenizes the first word of a text like Llama's: with a space before it."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = [*string.ascii_letters, "\n", ":", "."]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=letters, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


@pytest.mark.parametrize("prepend_scheme", ["first", "always"])
def test_soft_prompts_start_as_the_hand_written_ones_in_their_place(prepend_scheme, monkeypatch):
    monkeypatch.setattr(
        "tiny_models.llava.make_tokenizer", lambda *_, **__: make_sentencepiece_tokenizer(prepend_scheme)
    )
    tiny = make_vlm("llava")
    model, processor = UniGDForConditionalGeneration.from_vlm(tiny.model), UniGDProcessor(tiny.processor)
    sequences = [[make_image(1)], "a red cat", [make_image(2), "two blue dogs"]]
    written = [processor.process_sequences([sequence]) for sequence in sequences]
    expected = [model.embed(**batch) for batch in written]
    word = processor.tokenizer("Summarize", add_special_tokens=False)["input_ids"]
    assert word[0] not in written[1]["input_ids"][0].tolist()  # alone, the first word has other tokens
    model.add_soft_prompts(**processor.add_soft_prompts())
    for sequence, embedding in zip(sequences, expected, strict=True):
        batch = processor.process_sequences([sequence])
        assert set(processor.soft_prompt_ids) & set(batch["input_ids"][0].tolist())
        torch.testing.assert_close(model.embed(**batch), embedding, atol=1e-6, rtol=0)


def test_an_image_that_the_backbone_refuses_names_its_sequence():
    processor = UniGDProcessor(make_vlm("qwen2_vl").processor)
    with pytest.raises(SequenceError, match=r"Sequence 1 is refused by Qwen2VLProcessor: .*aspect ratio"):
        processor.process_sequences(["a cat", [make_image(1, (900, 3))], [make_image(2)]])


@pytest.mark.parametrize("sequences", ["a cat", make_image(1), b"a cat"])
def test_one_sequence_in_place_of_a_list_is_refused(llava, sequences):
    _, processor = llava
    with pytest.raises(
        TypeError, match=r"`sequences` must be a list of sequences, .* Put a single sequence into a list"
    ):
        processor.process_sequences(sequences)

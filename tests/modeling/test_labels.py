"""What is labelled of a conversation: every answer, exactly as it would be if it were the last."""

from functools import cache
from pathlib import Path

import pytest
import torch
import trl
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_unigd import UniGDProcessor
from hf_unigd.modeling import SequenceError
from tiny_models import make_image, make_vlm
from tiny_models.building import BUILDERS


TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def user(*parts):
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return {"role": "user", "content": content}


def assistant(*parts):
    return {**user(*parts), "role": "assistant"}


def labelled(processor, sequence, target, **kwargs):
    """The inputs of one sequence, and its labels that are not -100."""
    batch = processor.process_sequences([sequence], [target], **{"prompted": False, **kwargs})
    labels = batch["labels"][0]
    return batch, labels[labels != -100].tolist()


CHAT = [
    user(make_image(1), "What is it?"),
    assistant("A red cat. It sleeps."),
    user("And", make_image(2, (20, 44)), "here?"),
    assistant("Two blue dogs"),
    user("Sure?"),
]


@pytest.mark.parametrize("family", BUILDERS)
def test_every_answer_gets_the_labels_that_it_has_as_the_last(family):
    try:
        processor = UniGDProcessor(make_vlm(family).processor)
    except ModuleNotFoundError as error:  # older versions of transformers need torchvision for more processors
        pytest.skip(str(error))
    batch, labels = labelled(processor, CHAT, "Yes.", label_history=True, padding_side="left")
    alone = [labelled(processor, CHAT[:place], CHAT[place]["content"][0]["text"])[1] for place in (1, 3)]
    without, last = labelled(processor, CHAT, "Yes.", padding_side="left")
    assert labels == [*alone[0], *alone[1], *last]
    assert torch.equal(batch["input_ids"], without["input_ids"])  # the tokens of the whole conversation
    ids, eos = batch["input_ids"], processor.tokenizer.eos_token_id
    differ = (batch["labels"] != -100) & (batch["labels"] != ids)
    assert (batch["labels"][differ] == eos).all()  # where the template ends a turn without it


@pytest.mark.parametrize(
    ("family", "template"),
    [
        ("llava_next", "llava_next"),
        ("smolvlm", "smolvlm"),
        ("idefics3", "idefics3"),
        ("gemma3", "gemma3"),
        ("qwen2_5_vl", "qwen2_5_vl"),
        ("qwen3_vl", "qwen3_vl"),
    ],
)
def test_released_templates_get_the_mask_of_trl(family, template):
    """TRL has the templates of released models, and marks what the assistant generates in copies of them."""
    released, marked = TEMPLATES / f"{template}.jinja", TEMPLATES / f"{template}_training.jinja"
    if not marked.is_file():
        pytest.skip(f"trl {trl.__version__} has no {marked.name}")
    plain = make_vlm(family).processor
    plain.chat_template = released.read_text()
    processor = UniGDProcessor(plain)
    chat = [user(make_image(1), "What is it?"), *CHAT[1:2], user(make_image(2), "And here?"), *CHAT[3:]]
    batch, _ = labelled(processor, chat, "Yes.", label_history=True)
    theirs = plain.apply_chat_template(
        [*chat, assistant("Yes.")],
        chat_template=marked.read_text(),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
    )
    ids, labels, mask = batch["input_ids"][0], batch["labels"][0], torch.as_tensor(theirs["assistant_masks"])[0]
    ours = (labels == ids)[: len(mask)].tolist()
    common = min(len(ids), len(mask)) - 2  # the ends of the last answer may differ
    assert ids[:common].tolist() == theirs["input_ids"][0, :common].tolist()
    # TRL's masks end with the line break after a turn, which no model is asked for.
    text = [processor.tokenizer.decode([token]) for token in theirs["input_ids"][0].tolist()]
    theirs = [
        bool(flag) and not (text[place].isspace() and not mask[place + 1]) for place, flag in enumerate(mask[:-1])
    ]
    assert ours[:common] == theirs[:common]
    assert sum(ours) > 15


def test_llava_learns_every_answer_and_its_end():
    """LLaVA's rule (`preprocess_v1`): the loss is over the answers, each with `</s>`, and over nothing else."""
    processor = UniGDProcessor(make_vlm("llava").processor)
    chat = [user("q 1"), *(turn for n in range(1, 5) for turn in (assistant(f"a red {n}"), user(f"q {n + 1}")))]
    batch, labels = labelled(processor, chat, "a red 5", label_history=True)
    assert processor.tokenizer.decode(labels) == "".join(f" a red {n}</s>" for n in range(1, 6))
    inputs = processor.tokenizer.decode(batch["input_ids"][0])
    assert inputs.startswith("USER: q 1 ASSISTANT: a red 1 USER: q 2") and inputs.count("</s>") == 1


def test_a_conversation_that_ends_with_a_question_has_labels_of_its_answers():
    processor = UniGDProcessor(make_vlm("llava").processor)
    batch = processor.process_sequences([CHAT, "a cat"], prompted=False, label_history=[True, False])
    labels = batch["labels"]
    assert processor.tokenizer.decode(labels[0][labels[0] != -100]) == " A red cat. It sleeps.</s> Two blue dogs</s>"
    assert (labels[1] == -100).all()
    assert "labels" not in processor.process_sequences([CHAT, "a cat"], label_history=False)


@cache
def processor_of(family):
    return UniGDProcessor(make_vlm(family).processor)


WORDS = st.text(alphabet="aé🐈.\n 1", min_size=1, max_size=12).filter(str.strip)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "janus"])
@settings(max_examples=25, deadline=None)
@given(answers=st.lists(WORDS, min_size=1, max_size=3), images=st.booleans())
def test_any_text_of_an_answer_is_labelled_and_nothing_of_a_question(family, answers, images):
    processor = processor_of(family)
    question = user("xxx", make_image(1), "xxx") if images else user("xxx")
    chat = [turn for answer in answers for turn in (question, assistant(answer))]
    batch = processor.process_sequences([[*chat, question]], prompted=False, label_history=True)
    labels = batch["labels"][0]
    places = (labels != -100).nonzero().flatten().tolist()
    runs = torch.tensor(places).tensor_split((torch.tensor(places).diff() > 1).nonzero().flatten() + 1)
    assert len(runs) == len(answers)
    for run, answer in zip(runs, answers, strict=True):
        text = processor.tokenizer.decode(labels[run])
        assert text.strip().startswith(answer.strip())
        assert "x" not in text and text.endswith(processor.tokenizer.eos_token)


def test_the_texts_around_an_image_in_an_answer_are_learned_without_it():
    for family in ("llava", "qwen2_vl"):
        processor = UniGDProcessor(make_vlm(family).processor)
        chat = [user("Draw"), assistant("A red cat", make_image(1), "sleeps"), user("Again")]
        _, labels = labelled(processor, chat, "No", label_history=True)
        eos = processor.tokenizer.eos_token
        text = processor.tokenizer.decode(labels)
        assert "".join(text.split()) == f"Aredcatsleeps{eos}No{eos}"


def test_thoughts_that_a_template_removes_cannot_be_learned():
    released = TEMPLATES / "qwen3_5_think.jinja"
    if not released.is_file():
        pytest.skip(f"trl {trl.__version__} has no {released.name}")
    plain = make_vlm("qwen2_vl").processor  # whose tokenizer takes the marks of thoughts as text
    plain.chat_template = released.read_text()
    processor = UniGDProcessor(plain)
    chat = [user("Which?"), assistant("<think>\nIt is red.\n</think>\n\nA red cat."), user("Sure?")]
    with pytest.raises(SequenceError, match="Sequence 0 holds an earlier answer that the chat template changes"):
        labelled(processor, chat, "Yes.", label_history=True)
    with pytest.raises(SequenceError, match="mask_history=True"):
        processor.check_sequence(chat, "Yes.", prompted=False, label_history=True)
    _, labels = labelled(processor, chat, "Yes.")
    assert "It is red" not in processor.tokenizer.decode(labels)
    # Without thoughts, an earlier answer is learned as the template renders it: without their marks.
    _, labels = labelled(processor, [chat[0], assistant("A red cat."), chat[2]], "Yes.", label_history=True)
    assert processor.tokenizer.decode(labels).startswith("A red cat.<|im_end|>")


def test_a_template_that_ends_earlier_answers_in_several_ways_is_refused():
    plain = make_vlm("qwen2_vl").processor
    end = "{{ '<|im_end|>\n' }}"
    plain.chat_template = plain.chat_template.replace(
        end, "{% if loop.index != 2 or loop.length < 5 %}" + end + "{% endif %}"
    )
    with pytest.raises(SequenceError, match=r"ends otherwise than with '<\|im_end\|>'"):
        labelled(UniGDProcessor(plain), CHAT, "Yes.", label_history=True)


def test_slices_of_earlier_answers_do_not_move_with_their_labels():
    processor = UniGDProcessor(make_vlm("llava").processor)
    ends = lambda text: [place + 1 for place, letter in enumerate(text) if letter in ".?"] or [len(text)]  # noqa: E731
    (batch, labels), (plain, last) = (
        labelled(processor, CHAT, "Yes.", sentence_ends=ends, label_history=flag) for flag in (True, False)
    )
    assert torch.equal(batch["slice_spans"], plain["slice_spans"]) and len(labels) > len(last)


def test_flags_are_counted():
    processor = UniGDProcessor(make_vlm("llava").processor)
    with pytest.raises(ValueError, match=r"differ: \[2, 2, 2, 1\]"):
        processor.process_sequences(["a", "b"], label_history=[True])

"""Instructions of rows and of sets: what has them, and that training embeds what is served."""

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from hf_unigd import UniGDProcessor, UniGDTrainer
from hf_unigd.data import ExampleCheck, RowError, RowParser, SentenceSplitter
from hf_unigd.data.example import iter_parts
from hf_unigd.modeling.instructions_unigd import with_instruction, without_instruction
from hf_unigd.trainer import UniGDDataCollator, UniGDModelConfig
from hf_unigd.trainer.loading import load_for_training
from tiny_instructions import INSTRUCTIONS, embed, make_model
from tiny_models import make_image, make_vlm


A, B = make_image(1), make_image(2)
QUERY, DOCUMENT = INSTRUCTIONS["query"], INSTRUCTIONS["document"]
PAIR = {"anchor": ["what is it", A], "positive": "a cat", "negative": B}
CAPTIONS = {"image": A, "short_caption": "a cat", "long_caption": "A cat sleeps.", "negative": "a dog"}
CHAT = {
    "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what <image>"}],
    "images": [A],
    "positive_messages": [{"role": "user", "content": "a cat"}],
    "negative_messages": [{"role": "user", "content": "a dog"}],
}
TURNS = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day."}]}
MMEB = {"qry": "<|image_1|>\nWhat?", "qry_image_path": A, "pos_text": "a cat", "neg_text": "a dog"}


def parse(row, **settings):
    return RowParser(lambda text: len(text.split()), trust_caption_columns=True, **settings)(row, 7)


def instructions_of(sequence):
    return [part["text"] for _, part in iter_parts(sequence) if part["type"] == "instruction"]


@pytest.mark.parametrize("row", [PAIR, CAPTIONS, CHAT, MMEB], ids=["pair", "captions", "chat", "mmeb"])
def test_an_instruction_of_a_row_precedes_that_of_its_set(row):
    plain = parse(row)
    own = parse({**row, "instruction": f" {QUERY}", "document_instruction": DOCUMENT}, instruction="x")
    of_set = parse(row, instruction=QUERY, document_instruction=DOCUMENT)
    for example in (own, of_set):
        assert example.anchor == with_instruction(plain.anchor, QUERY)
        assert example.positive == with_instruction(plain.positive, DOCUMENT)
        assert example.negatives == [with_instruction(each, DOCUMENT) for each in plain.negatives]
        assert instructions_of(example.anchor) == [QUERY] and example.target == plain.target
        assert without_instruction(example.anchor) == plain.anchor
    none = parse({**row, "instruction": "", "document_instruction": None}, instruction=QUERY)
    assert none.anchor == plain.anchor and none.positive == plain.positive


def test_only_what_is_embedded_has_one():
    assert parse(TURNS, instruction=QUERY).anchor == parse(TURNS).anchor
    assert instructions_of(parse(TURNS, instruction=QUERY, requires_match=False).anchor) == [QUERY]
    only_long = {"image": A, "long_caption": "A cat sleeps."}
    assert instructions_of(parse(only_long, instruction=QUERY, document_instruction=DOCUMENT).anchor) == [QUERY]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**TURNS, "instruction": "a"}, "an `instruction`, but only what is embedded has one"),
        ({"image": A, "long_caption": "a", "document_instruction": "b"}, "a `document_instruction`, but no match"),
        ({**PAIR, "instruction": 3}, "an `instruction` of type int"),
        ({**PAIR, "instruction": "see <image>"}, "the reserved token '<image>' in the text 'see <image>'"),
        ({**PAIR, "document_instruction": "see <image>"}, "the reserved token '<image>'"),
    ],
)
def test_bad_rows_say_why(row, message):
    with pytest.raises(RowError, match=f"Row 7 has {message}"):
        parse(row, find_reserved=lambda text: "<image>" if "<image>" in text else None)


def test_an_instruction_is_no_caption_and_no_slice():
    row = {"image": A, "caption": "a cat", "instruction": "word " * 600}
    assert parse(row, splitter=SentenceSplitter()).target is None
    slices = parse({**CAPTIONS, "instruction": "Find it. Now."}, splitter=SentenceSplitter()).slices
    assert [one.content for one in slices] == [A, "A cat sleeps."]


def test_the_length_check_counts_it():
    processor = UniGDProcessor(make_vlm("llava").processor)
    check = ExampleCheck(processor, max_length=60)
    check(parse(PAIR))
    for name in ("instruction", "document_instruction"):
        with pytest.raises(RowError, match=r"Row 7 has \d+ tokens .*`max_length=60`"):
            check(parse({**PAIR, name: "red " * 60}))


def collate(model, rows):
    parser = RowParser(len, trust_caption_columns=True, instruction=QUERY, document_instruction=DOCUMENT)
    return UniGDDataCollator(model.processor)([parser(row, place) for place, row in enumerate(rows)])


@pytest.mark.parametrize("row", [PAIR, CAPTIONS, CHAT], ids=["pair", "captions", "chat"])
def test_what_is_trained_is_what_is_served(row):
    model, plain = make_model(), parse(row)
    batch = collate(model, [row])
    with torch.no_grad():
        vectors = torch.cat([model.embed(**{**chunk, "labels": None}) for chunk in batch["chunks"]])
    served = embed(model, [plain.anchor], prompt_name="query")
    torch.testing.assert_close(vectors[batch["places"]["anchors"]], served, atol=1e-5, rtol=0)
    documents = [plain.positive, *plain.negatives]
    places = torch.cat([batch["places"]["positives"], batch["places"]["negatives"]])
    torch.testing.assert_close(vectors[places], embed(model, documents, prompt_name="document"), atol=1e-5, rtol=0)


def test_another_question_about_an_image_is_another_query_and_equal_answers_are_equal():
    rows = [
        {"anchor": A, "positive": "a cat", "instruction": "What is it?"},
        {"anchor": A, "positive": "a cat", "instruction": "What is it?", "document_instruction": "Name it."},
        {"anchor": A, "positive": "red", "instruction": "Which colour?"},
    ]
    batch = collate(make_model(), rows)
    first, second, third = batch["anchor_keys"].tolist()
    assert first == second != third
    first, second, third = batch["positive_keys"].tolist()
    assert first == second != third


def test_the_trainer_takes_those_of_the_processor(tmp_path):
    model = make_model()
    rows = Dataset.from_list([{"anchor": "a cat", "positive": "a dog"}, {"anchor": "b", "positive": "c"}])
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, per_device_train_batch_size=2)
    trainer = UniGDTrainer(model, args, train_dataset=rows, processing_class=model.processor)
    example = trainer.train_dataset[0]
    assert (instructions_of(example.anchor), instructions_of(example.positive)) == ([QUERY], [DOCUMENT])
    (example, _) = trainer.get_eval_dataloader(rows).dataset
    assert instructions_of(example.anchor) == [QUERY]


def test_arguments_of_a_run_are_saved_with_the_processor(tmp_path):
    tiny = make_vlm()
    for part in (tiny.model, tiny.processor):
        part.save_pretrained(tmp_path / "vlm")
    settings = {"instruction": QUERY, "document_instruction": DOCUMENT, "dtype": "float32"}
    model, processor, _ = load_for_training(UniGDModelConfig(model_name_or_path=str(tmp_path / "vlm"), **settings))
    assert processor.instructions == {"query": QUERY, "document": DOCUMENT}
    model.processor = processor
    model.save_pretrained(tmp_path / "ours")
    again = UniGDModelConfig(model_name_or_path=str(tmp_path / "ours"), instruction="Find a car.", dtype="float32")
    assert load_for_training(again)[1].instructions == {"query": "Find a car.", "document": DOCUMENT}
    with pytest.raises(ValueError, match="'query' holds the reserved token '<image>'"):
        load_for_training(UniGDModelConfig(model_name_or_path=str(tmp_path / "vlm"), instruction="a <image>"))

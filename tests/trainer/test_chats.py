"""Training on chats: all answers are learned, without the embedding prompt, and evaluation counts the same tokens."""

import math

import pytest
import torch

from hf_unigd import UniGDProcessor
from hf_unigd.data import RowError
from hf_unigd.trainer.batches import count_targets
from tiny_models import make_image
from trainer_cases import make_trainer


ANSWERS = ("A red cat. It sleeps.", "Two dogs", "No.", "Yes, seen from the left.", "Blue.")


def make_chats(count=4, **columns):
    chats = []
    for row in range(count):
        turns = []
        for place, answer in enumerate(ANSWERS):
            question = f"What is it {row}?" if place else f"<image>What is it {row}?"
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        chats.append({"messages": turns, "images": [make_image(row)]})
    return [{**chat, **{name: values[row] for name, values in columns.items()}} for row, chat in enumerate(chats)]


MATCHES = {"positive_messages": [[{"role": "user", "content": f"cat {row}"}] for row in range(4)]}


@torch.no_grad()
def next_token_loss(trainer, prefixes):
    """The mean loss over the last answers of chats that end with one, each run alone through the backbone."""
    total, count = 0.0, 0
    for turns in prefixes:
        batch = trainer.processing_class.process_sequences([turns[:-1]], [text_of(turns[-1])], prompted=False)
        tokens = int((batch["labels"] != -100).sum())
        inputs = {name: value for name, value in batch.items() if name != "spans"}
        total, count = total + trainer.model.vlm(**inputs).loss.item() * tokens, count + tokens
    return total / count, count


def text_of(turn):
    return turn["content"][0]["text"]


def prefixes_of(example, last_alone=False):
    turns = [*example.anchor, {"role": "assistant", "content": [{"type": "text", "text": example.target}]}]
    return [turns[:end] for end in range(2, len(turns) + 1, 2) if not last_alone or end == len(turns)]


@pytest.mark.parametrize("columns", [{}, MATCHES], ids=["answered", "embedded too"])
@pytest.mark.parametrize("mask_history", [False, True])
def test_the_loss_is_the_mean_over_all_answers_or_the_last_ones(tmp_path, mask_history, columns):
    rows = make_chats(**columns)
    settings = {"mask_history": mask_history, "contrastive_weight": float(bool(columns))}
    trainer = make_trainer(tmp_path, rows, eval_rows=rows, **settings)
    prefixes = [turns for example in trainer.train_dataset for turns in prefixes_of(example, mask_history)]
    expected, tokens = next_token_loss(trainer, prefixes)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert count_targets(batch) == tokens
    metrics = trainer.evaluate()
    assert metrics["eval_causal_lm_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    trainer.train()
    assert trainer.state.log_history[0]["causal_lm_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_a_chat_with_a_match_is_embedded_at_the_prompt_and_answered_without_it(tmp_path, chunk_size):
    trainer = make_trainer(tmp_path, make_chats(**MATCHES), gradient_cache_chunk_size=chunk_size)
    examples = list(trainer.train_dataset)
    batch = trainer.data_collator(examples)
    for chunk in batch["chunks"]:
        for ids, labels in zip(chunk["input_ids"], chunk["labels"], strict=True):
            text, is_learned = trainer.processing_class.decode(ids), bool((labels != -100).any())
            assert is_learned != ("Summarize" in text)
            assert not is_learned or all(answer in text for answer in ANSWERS)
    assert sum(len(chunk["labels"]) for chunk in batch["chunks"]) == 4 * 3  # learned, embedded, and its match
    with torch.no_grad():
        chunks = [{name: value for name, value in chunk.items() if name != "labels"} for chunk in batch["chunks"]]
        found = torch.cat([trainer.model.embed(**chunk) for chunk in chunks if len(chunk["spans"])])
        for name, sequences in (
            ("anchors", [e.anchor for e in examples]),
            ("positives", [e.positive for e in examples]),
        ):
            alone = trainer.model.embed(**trainer.processing_class.process_sequences(sequences, padding_side="right"))
            torch.testing.assert_close(found[batch["places"][name]], alone, atol=1e-5, rtol=0)


def test_at_the_last_slice_one_sequence_is_embedded_and_answered(tmp_path):
    trainer = make_trainer(tmp_path, make_chats(**MATCHES))
    trainer.data_collator.processor = UniGDProcessor(
        trainer.processing_class.vlm_processor, embedding_position="last_slice"
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert [len(chunk["labels"]) for chunk in batch["chunks"]] == [4, 4]
    assert (batch["chunks"][0]["labels"] != -100).any(1).all()


def test_an_answer_that_the_template_changes_is_a_bad_row(tmp_path):
    """As templates of models that think do with the thoughts of earlier answers."""
    rows = make_chats()
    rows[2]["messages"][1]["content"] = "<think>It is red.</think>A red cat."
    trainer = make_trainer(tmp_path, rows)
    processor = trainer.processing_class
    template = processor.chat_template.replace("{{ c['text'] + ' ' }}", "{{ c['text'].split('</think>')[-1] + ' ' }}")
    processor.vlm_processor.chat_template = template
    with pytest.raises(RowError, match="Row 2 holds an earlier answer that the chat template changes"):
        trainer.data_collator(list(trainer.train_dataset))
    skipping = make_trainer(tmp_path, rows, skip_bad_rows=True)
    skipping.data_collator.processor.vlm_processor.chat_template = template
    assert skipping.data_collator(list(skipping.train_dataset))["rows"].tolist() == [0, 1, 3]

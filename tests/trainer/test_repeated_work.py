"""A data loader's worker hashes each image once and tokenizes each text once."""

from collections import Counter
from unittest import mock

import pytest

from hf_unigd import UniGDDataCollator, UniGDProcessor
from hf_unigd.data import RowParser, SentenceSplitter, example
from hf_unigd.data.lengths import TokenCounter
from hf_unigd.trainer.prefixes import PrefixSampler
from tiny_models import make_vlm
from trainer_cases import make_rows, make_trainer


def test_masks_slices_and_the_vision_cache_share_one_hash_of_an_image():
    splitter, rows = SentenceSplitter(), make_rows(4)
    examples = [RowParser(len, splitter=splitter)(rows[place], place) for place in range(4)]
    collator = UniGDDataCollator(
        UniGDProcessor(make_vlm().processor), splitter=splitter, prefixes=PrefixSampler(2, 0), with_image_keys=True
    )
    with mock.patch.object(example.xxhash, "xxh3_128", side_effect=example.xxhash.xxh3_128) as hashed:
        batch = collator(examples)
        slices = {part.key for each in examples for part in each.slices if part.modality == example.IMAGE}
    assert hashed.call_count == 4
    assert slices == set(batch["anchor_keys"].tolist())
    assert len({key for key, _ in batch["chunks"][0]["image_keys"]}) == len(slices) == 4


def test_each_caption_is_tokenized_once_for_the_batch(tmp_path):
    trainer = make_trainer(tmp_path, make_rows(4), check_rows="off")
    examples = [trainer.train_dataset[place] for place in range(4)]
    tokenizer = type(trainer.processing_class.tokenizer)
    texts = []

    def tokenize(self, text, *args, _tokenize=tokenizer.__call__, **kwargs):
        texts.extend([text] if isinstance(text, str) else text)
        return _tokenize(self, text, *args, **kwargs)

    with mock.patch.object(tokenizer, "__call__", tokenize):
        trainer.data_collator(examples)
    for each in examples:
        assert sum(each.target in text for text in texts) == 1
    prompt = trainer.processing_class.prompts["image"]
    alone = Counter(text for text in texts if "<image>" not in text and text.endswith(f"{prompt} ASSISTANT:"))
    assert list(alone.values()) == [1]  # the end of the prompt, which all answers continue


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_tokens_are_counted_as_the_tokenizer_makes_them(family):
    tokenizer = UniGDProcessor(make_vlm(family).processor).tokenizer
    texts = ["a red cat", "", "Ein Häuschen, 5 % teurer.\n\n你好  ", "a" * 99]
    expected = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    tokenizer(texts, padding="max_length", truncation=True, max_length=4)  # settings that the tokenizer keeps
    assert [TokenCounter(tokenizer)(text) for text in texts] == expected
    with mock.patch.object(type(tokenizer), "is_fast", False):
        assert [TokenCounter(tokenizer)(text) for text in texts] == expected

"""What transformers, Trainer, vLLM and `datasets` read of the config, the processor, the model and the errors."""

import copy
import inspect
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMultimodalLM, BatchFeature, Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

import hf_unigd
import tiny_models
from hf_unigd import UniGDConfig, UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.data import RowError
from hf_unigd.modeling import SequenceError
from tiny_models import FAMILIES, make_image, make_vlm


SEQUENCES = [[make_image(1)], "a red cat", ["two blue dogs", make_image(2, (40, 20))]]
TARGETS = ["a cat", None, "the green grass"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_shows_the_backbones_own_configs(family, tmp_path):
    model = UniGDForConditionalGeneration.from_vlm(make_vlm(family).model)
    for config in (model.config, copy.deepcopy(model.config)):
        assert config.text_config is config.vlm_config.text_config
        assert config.text_config is config.get_text_config()
        assert config.vision_config is config.vlm_config.vision_config
    model.config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for known in (saved, model.config.to_dict(), model.config):
        assert "vlm_config" in known
        assert not {"text_config", "vision_config", "custom_pipelines"} & set(known)
    loaded = UniGDConfig.from_pretrained(tmp_path)
    assert loaded.text_config.to_dict() == model.config.text_config.to_dict()
    assert loaded.vision_config.to_dict() == model.config.vision_config.to_dict()


def test_a_backbone_without_a_vision_config_is_named():
    config = UniGDConfig({"model_type": "chameleon"})
    with pytest.raises(AttributeError, match=r"backbone \('chameleon'\) has no `vision_config`"):
        config.vision_config  # noqa: B018
    assert not hasattr(config, "vision_config")
    assert config.text_config is config.vlm_config  # which has no part for the text alone


def test_a_saved_model_loads_as_a_multimodal_language_model(llava, tmp_path):
    model, processor = llava
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, UniGDForConditionalGeneration)
    batch = processor.process_sequences(SEQUENCES)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.fixture(scope="module", params=FAMILIES)
def processor(request):
    return UniGDProcessor(make_vlm(request.param).processor)


def test_the_processor_shows_its_components(processor):
    assert UniGDProcessor.get_attributes() == ["image_processor", "tokenizer"]
    for name in processor.get_attributes():
        assert getattr(processor, name) is getattr(processor.vlm_processor, name)
    assert processor.image_token == processor.vlm_processor.image_token
    assert processor.image_token_id == processor.vlm_processor.image_token_id
    # What `ProcessorMixin` makes of these.
    assert processor.all_special_multimodal_tokens == [processor.image_token]
    ids = processor.process_sequences(SEQUENCES)["input_ids"]
    expected = (ids == processor.image_token_id).int().tolist()
    assert processor.create_mm_token_type_ids(ids.tolist()) == expected


def test_a_backbone_without_image_token_id_has_none_in_the_wrapper_either():
    vlm_processor = make_vlm("llava").processor
    del vlm_processor.image_token_id
    assert not hasattr(UniGDProcessor(vlm_processor), "image_token_id")


def test_the_processor_takes_images_and_text_by_name_and_by_place(processor):
    names = list(inspect.signature(processor.__call__).parameters)
    assert names == ["images", "text", "kwargs"]
    text = [processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])]
    images = [make_image(1)]
    expected = processor.vlm_processor(images=images, text=text, return_tensors="pt")
    for found in (
        processor(images, text, return_tensors="pt"),
        processor(text=text, images=images, return_tensors="pt"),
    ):
        assert isinstance(found, BatchFeature)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_processor_counts_the_tokens_of_images(processor):
    sizes = [(20, 24), (64, 20), (16, 16)]
    images = [make_image(place, (width, height)) for place, (height, width) in enumerate(sizes)]
    ids = processor.process_sequences([[image] for image in images])["input_ids"]
    counted = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
    assert counted == (ids == processor.image_token_id).sum(1).tolist()


def test_the_tokens_of_images_are_counted_for_processors_that_cannot_say(processor, monkeypatch):
    sizes = [(20, 24), (64, 20), (16, 16)]
    expected = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
    for owner in type(processor.vlm_processor).__mro__:
        if "_get_num_multimodal_tokens" in vars(owner):
            monkeypatch.delattr(owner, "_get_num_multimodal_tokens")
    assert not hasattr(processor.vlm_processor, "_get_num_multimodal_tokens")
    assert processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens == expected


def shifted(labels):
    return torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()


@pytest.mark.parametrize("num_items_in_batch", [None, 7, torch.tensor(7)])
def test_shifted_labels_give_the_loss_of_labels(llava, num_items_in_batch):
    model, processor = llava
    batch = processor.process_sequences(SEQUENCES, TARGETS)
    labels = batch.pop("labels")
    outputs = model(**batch, labels=labels, num_items_in_batch=num_items_in_batch)
    expected = ForCausalLMLoss(outputs.logits, labels, outputs.logits.shape[-1], num_items_in_batch)
    torch.testing.assert_close(outputs.loss, expected)
    alone = model(**batch, shift_labels=shifted(labels), num_items_in_batch=num_items_in_batch)
    assert torch.equal(alone.loss, outputs.loss)
    # They win over labels, and the last position may have a target, as where a sequence is split over processes.
    ends = shifted(labels)
    ends[:, -1] = 5
    both = model(**batch, labels=labels, shift_labels=ends, num_items_in_batch=num_items_in_batch)
    expected = ForCausalLMLoss(outputs.logits, labels, outputs.logits.shape[-1], num_items_in_batch, shift_labels=ends)
    torch.testing.assert_close(both.loss, expected)
    assert not torch.allclose(both.loss, outputs.loss)


@pytest.mark.parametrize("num_items_in_batch", [None, 7])
def test_shifted_labels_give_the_loss_of_labels_in_several_batches(llava, num_items_in_batch):
    model, processor = llava
    batches = [processor.process_sequences(SEQUENCES[place:], TARGETS[place:]) for place in (0, 2)]
    expected = model(batches=batches, num_items_in_batch=num_items_in_batch).loss
    others = [{**batch, "shift_labels": shifted(batch["labels"])} for batch in batches]
    for batch in others:
        batch["labels"] = torch.zeros_like(batch["labels"])
    assert torch.equal(model(batches=others, num_items_in_batch=num_items_in_batch).loss, expected)
    del others[0]["labels"]
    assert torch.equal(model(batches=others, num_items_in_batch=num_items_in_batch).loss, expected)


def test_logits_are_skipped_in_training_with_shifted_labels(llava):
    model, processor = llava
    batch = processor.process_sequences(SEQUENCES, TARGETS)
    batch["shift_labels"] = shifted(batch.pop("labels"))
    assert model.train()(**batch).logits is None
    assert torch.equal(model.eval().embed(**batch), model(**batch).embeddings)


def test_trainer_needs_no_shifted_labels_to_evaluate(llava, tmp_path):
    """It takes every named parameter with `label` in its name for a label that each batch has."""
    model, processor = llava
    batch = processor.process_sequences(SEQUENCES, TARGETS)
    args = TrainingArguments(tmp_path, report_to=[], use_cpu=True, remove_unused_columns=False)
    trainer = Trainer(model, args, eval_dataset=[0], data_collator=lambda _rows: dict(batch))
    assert trainer.label_names == ["labels"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(model(**batch).loss.item())


def exceptions_of_the_package():
    """Every exception class whose constructor is its own, but for those of the server, which no worker raises."""
    names = [name for name in sys.modules if name.partition(".")[0] == "hf_unigd"]
    for name in names:
        for value in vars(sys.modules[name]).values():
            is_exception = inspect.isclass(value) and issubclass(value, Exception)
            is_ours = is_exception and value.__module__.startswith("hf_unigd") and "__init__" in vars(value)
            if is_ours and not value.__module__.startswith("hf_unigd.serving"):
                yield value


def test_errors_survive_pickling():
    assert set(exceptions_of_the_package()) == {SequenceError, RowError}
    for error in (SequenceError(3, "is empty."), RowError(3, "is empty.")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert (str(again), vars(again)) == (str(error), vars(error))


MAP = """
from datasets import Dataset
from hf_unigd import UniGDProcessor
from tiny_models import make_vlm

def process(row):
    return {"ids": processor.process_sequences([row["text"]])["input_ids"][0].tolist()}

if __name__ == "__main__":
    processor = UniGDProcessor(make_vlm("llava").processor)
    rows = Dataset.from_dict({"text": ["a cat", "a dog", "a car", " "]})
    try:
        rows.map(process, num_proc=2)
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_a_bad_text_stops_a_parallel_map(tmp_path):
    (tmp_path / "run.py").write_text(MAP)
    paths = [str(Path(file).parent) for file in (Path(tiny_models.__file__).parent, Path(hf_unigd.__file__).parent)]
    run = subprocess.Popen(
        [sys.executable, "run.py"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": ":".join(paths), "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        output, _ = run.communicate(timeout=240)
    except subprocess.TimeoutExpired:  # an error that cannot be unpickled leaves `map` waiting, and so its workers
        os.killpg(run.pid, signal.SIGKILL)
        raise
    assert "SequenceError Sequence 0 holds an empty text." in output

"""A run that pushes while it trains: each commit is a whole checkpoint, and nothing but that."""

import pytest

from loopback_hub import TOKENS, run_client, running_hub


TRAIN = """
from pathlib import Path
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from peft import LoraConfig
from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor, UniGDTrainer, UniGDTrainingArguments
from tiny_models import make_image, make_vlm

rows = Dataset.from_dict({
    "image": [make_image(place) for place in range(8)],
    "short_caption": [f"cat {place}" for place in range(8)],
    "long_caption": [f"A cat on the grass, seen {place} times." for place in range(8)],
})

def train(name, model, processor, peft_config=None, waits=True, prepare=None, **kwargs):
    settings = dict(
        output_dir=name, hub_model_id=f"ada/{name}", push_to_hub=True, max_steps=3, save_steps=1, logging_steps=1,
        save_total_limit=1, per_device_train_batch_size=4, learning_rate=3e-3, report_to=[], use_cpu=True,
        trust_caption_columns=True,
    )
    args = UniGDTrainingArguments(**{**settings, **kwargs})
    logs = Path(name, "runs", "here")
    logs.mkdir(parents=True)
    (logs / "events.out.tfevents.1").write_text(str(logs.resolve()))
    Path(name, "config.json").write_text('{"model_type": "unigd"}')  # an earlier run saved another model here
    for left_from_before in ("probe.safetensors", "tokenizer.model"):  # the weights of another model are refused
        Path(name, left_from_before).write_bytes(b"another model")
    trainer = UniGDTrainer(model, args, train_dataset=rows, processing_class=processor, peft_config=peft_config)
    on_save = trainer._push_from_checkpoint
    def push_and_embed(folder):
        on_save(folder)
        if trainer.push_in_progress is not None:
            trainer.push_in_progress.wait_until_done()
            pushed = HfApi().model_info(f"ada/{name}").sha
            model.eval()
            answers.setdefault(name, {})[pushed] = model.embed(**processor.process_sequences(["a red cat"])).tolist()
            model.train()
    if waits:
        trainer._push_from_checkpoint = push_and_embed
    if prepare is not None:
        prepare(trainer)
    try:
        trainer.train()
    finally:
        answers.setdefault("done", {})[name] = trainer.push_in_progress is None or trainer.push_in_progress.is_done()

torch.manual_seed(0)
tiny = make_vlm()
processor = UniGDProcessor(tiny.processor)
train("whole", UniGDForConditionalGeneration.from_vlm(tiny.model, head_type="mlp", embedding_dim=8), processor)

model = UniGDForConditionalGeneration.from_pretrained("ada/whole")
train("adapter", model, processor, LoraConfig(r=4, task_type="CAUSAL_LM"), hub_strategy="checkpoint")
def fresh():
    return UniGDForConditionalGeneration.from_pretrained("ada/whole")
answers["silent"] = outcome(lambda: train("silent", fresh(), processor, hub_strategy="end"))
answers["unwatched"] = outcome(lambda: train(
    "unwatched", fresh(), processor, waits=False, hub_always_push=True, hub_strategy="all_checkpoints"
))

def fail(*args):
    raise OSError("No space left on device")
def without_space(trainer):
    trainer._push_staged = fail
answers["full"] = outcome(lambda: train("full", fresh(), processor, waits=False, prepare=without_space))
answers["full_checkpoint"] = Path("full", "checkpoint-3", "trainer_state.json").is_file()
answers["left"] = [path.name for folder in Path().iterdir() if folder.is_dir() for path in folder.glob("_push*")]

from hf_unigd.trainer import checkpoints
from transformers import TrainerCallback
import time
push = checkpoints.push_checkpoint
def push_slowly(*args, **kwargs):
    time.sleep(2)
    return push(*args, **kwargs)
class Stop(TrainerCallback):  # as SaveOnSigterm does
    def on_save(self, *args, **kwargs):
        sys.exit(143)
checkpoints.push_checkpoint = push_slowly
answers["stopped"] = outcome(lambda: train(
    "stopped", fresh(), processor, waits=False, prepare=lambda trainer: trainer.add_callback(Stop())
))
checkpoints.push_checkpoint = push

private = {"hub_model_id": "ada/whole", "hub_private_repo": True}
answers["public"] = outcome(lambda: train("public", fresh(), processor, **private))
local = UniGDForConditionalGeneration.from_pretrained("whole/checkpoint-3")
answers["local"] = outcome(lambda: train("local", local, processor, LoraConfig(r=4, task_type="CAUSAL_LM")))
"""

STRANGER = """
sys.modules["hf_unigd"] = None
from transformers import AutoModel, AutoProcessor
for name, commits in {commits!r}.items():
    answers[name] = {{}}
    for commit in commits:
        processor = AutoProcessor.from_pretrained(f"ada/{{name}}", revision=commit, trust_remote_code=True)
        # `revision` would be the base model's too.
        where = {{"revision": commit}} if name == "whole" else {{"adapter_kwargs": {{"revision": commit}}}}
        model = AutoModel.from_pretrained(f"ada/{{name}}", trust_remote_code=True, **where)
        answers[name][commit] = model.embed(**processor.process_sequences(["a red cat"])).tolist()
"""


@pytest.fixture(scope="module")
def hub():
    with running_hub(**TOKENS) as hub:
        yield hub


@pytest.fixture(scope="module")
def answers(hub, tmp_path_factory):
    return run_client(hub, tmp_path_factory.mktemp("run"), TRAIN)[0]


def test_every_push_of_a_run_loads_to_the_vectors_of_that_step(hub, answers, tmp_path):
    commits = {name: list(answers[name]) for name in ("whole", "adapter")}
    assert {name: len(found) for name, found in commits.items()} == {"whole": 3, "adapter": 3}
    loaded, _ = run_client(hub, tmp_path, STRANGER.format(commits=commits))
    for name in commits:
        assert len({str(vectors) for vectors in answers[name].values()}) == 3
        for commit, (vector,) in loaded[name].items():
            assert vector == pytest.approx(answers[name][commit][0], abs=1e-5)


def test_nothing_of_the_run_is_pushed_with_it(hub, answers):
    for name in ("whole", "adapter"):
        for commit, files in hub.repositories[f"ada/{name}"].refs["main"][1:]:
            served = {file for file in files if not file.startswith("last-checkpoint/")}
            assert not any(file.startswith(("runs/", "checkpoint-")) for file in served), commit
            assert not served & {"training_args.bin", "optimizer.pt", "trainer_state.json"}, commit
            assert {"README.md", "curves.png", "modeling_unigd.py", "probe.safetensors"} <= served, commit
            weights = {file for file in served if "model" in file and file.endswith(".safetensors")}
            assert weights == {"model.safetensors" if name == "whole" else "adapter_model.safetensors"}, commit
    assert 'from_pretrained("ada/adapter"' in hub.files("ada/adapter")["README.md"].decode()


def test_a_strategy_that_resumes_pushes_the_state_too(hub, answers):
    files = hub.files("ada/adapter")
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= set(files)
    assert not any(file.startswith("last-checkpoint/") for file in hub.files("ada/whole"))
    assert answers["silent"] == "None" and list(hub.files("ada/silent")) == [".gitattributes"]


def test_a_run_ends_when_its_pushes_have(hub, answers):
    assert answers["unwatched"] == "None"
    files = hub.files("ada/unwatched")
    assert {"model.safetensors", *(f"checkpoint-{step}/optimizer.pt" for step in (1, 2, 3))} <= set(files)
    assert answers["left"] == []


def test_a_run_that_is_stopped_waits_for_its_push(hub, answers):
    assert answers["stopped"] == "SystemExit: 143" and answers["done"]["stopped"]
    assert "model.safetensors" in hub.files("ada/stopped")


def test_a_push_that_fails_costs_no_checkpoint(answers):
    assert answers["full"] == "None" and answers["full_checkpoint"]


def test_what_should_be_private_is_refused_before_training(hub, answers):
    assert "ada/whole exists already and is public" in answers["public"]


def test_an_adapter_that_nobody_could_load_is_refused_before_training(hub, answers):
    assert "is not on the Hub, so nobody could load the adapter" in answers["local"]
    assert "ada/local" not in hub.repositories

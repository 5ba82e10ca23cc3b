"""The unmodified client against a hub on the loopback: pushes, pulls, pull requests, and all that goes wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from loopback_hub import TOKENS, run_client, running_hub
from tiny_models import make_vlm


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A saved checkpoint with what training leaves beside it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny = make_vlm("llava")
    torch.manual_seed(0)
    model = UniGDForConditionalGeneration.from_vlm(tiny.model, head_type="mlp", embedding_dim=8)
    model.processor = UniGDProcessor(tiny.processor)
    model.save_pretrained(folder)
    (folder / "training_args.bin").write_bytes(b"hub_token=" + TOKENS["ada"].encode())
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "optimizer.pt").write_bytes(b"state")
    for path in (
        "runs/here/events.out.tfevents.1",
        "logs/events.out.tfevents.1",
        "wandb/run/log",
        "global_step2/a.pt",
    ):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_bytes(b"state")
    (folder / "trainer_state.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def hub():
    with running_hub(**TOKENS) as hub:
        yield hub


PUSH_AND_PULL = """
from huggingface_hub import HfApi
from hf_unigd import UniGDForConditionalGeneration, UniGDModel, UniGDProcessor
from hf_unigd.cli.main import main
from hf_unigd.hub import load_checkpoint
import torch

folder = {folder!r}
def push(repo_id, *more):
    return outcome(lambda: main(["push", folder, repo_id, *more]))

answers["push"] = push("ada/model")
first = HfApi().model_info("ada/model").sha
model = UniGDForConditionalGeneration.from_pretrained("ada/model")
processor = UniGDProcessor.from_pretrained("ada/model")
batch = processor.process_sequences(["a red cat"])
answers["embedding"] = model.embed(**batch)[0].tolist()

# Another model, pushed by its own method to the same place, and by revision the first one.
model.embedding_head.projection[0].weight.data *= -1
model.push_to_hub("ada/model")
UniGDProcessor.from_pretrained("ada/model")  # into the cache
from hf_unigd.data.encoders import encoder_commit
by_id = UniGDModel.from_pretrained("ada/model", revision=first)
newest = HfApi().model_info("ada/model").sha
answers["commits"] = [by_id.config._commit_hash == first, encoder_commit("ada/model") == newest]
answers["second"] = UniGDModel.from_pretrained("ada/model").embed(**batch)[0].tolist()
answers["by_revision"] = UniGDModel.from_pretrained("ada/model", revision=first).embed(**batch)[0].tolist()
loaded, _ = load_checkpoint("ada/model", revision=first)
answers["by_load_checkpoint"] = loaded.embed(**batch)[0].tolist()
push("ada/secret", "--private", "true")
push("ada/model", "--create_pr", "true")
push("ada/model", "--revision", "tried")
model.save_pretrained(
    "saved", push_to_hub=True, repo_id="ada/hidden", private=True, create_pr=True, max_shard_size="60KB"
)
answers["pull_request"] = UniGDModel.from_pretrained("ada/model", revision="refs/pr/1").embed(**batch)[0].tolist()
"""

STRANGER = """
sys.modules["hf_unigd"] = None
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained("ada/model", trust_remote_code=True, revision={revision!r})
model = AutoModel.from_pretrained("ada/model", trust_remote_code=True, revision={revision!r})
answers["embedding"] = model.embed(**processor.process_sequences(["a red cat"]))[0].tolist()
speaker = AutoModelForImageTextToText.from_pretrained("ada/model", trust_remote_code=True, revision={revision!r})
answers["speaks"] = list(speaker.generate(**processor.process_sequences(["a"]), max_new_tokens=2).shape)
answers["others_repository"] = outcome(lambda: AutoModel.from_pretrained("ada/secret", trust_remote_code=True))
"""


@pytest.fixture(scope="module")
def pushed(hub, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ada")
    answers, printed = run_client(hub, folder, PUSH_AND_PULL.format(folder=str(checkpoint)))
    return answers, printed, folder


def expected_embedding(checkpoint):
    model = UniGDForConditionalGeneration.from_pretrained(checkpoint)
    processor = UniGDProcessor.from_pretrained(checkpoint)
    with torch.no_grad():
        return model.embed(**processor.process_sequences(["a red cat"]))[0].tolist()


def test_what_is_pushed_is_what_is_pulled_by_id_and_by_revision(hub, checkpoint, pushed):
    answers, _, _ = pushed
    expected = pytest.approx(expected_embedding(checkpoint), abs=1e-5)
    assert answers["push"] == "None"
    assert answers["embedding"] == expected
    assert answers["second"] != expected
    assert answers["by_revision"] == answers["by_load_checkpoint"] == expected
    assert answers["pull_request"] == expected
    assert answers["commits"] == [True, True]


def test_one_commit_holds_all_that_users_need_and_nothing_of_the_run(hub, checkpoint, pushed):
    commits = hub.repositories["ada/model"].refs["main"]
    assert len(commits[0][1]) == 1  # .gitattributes, when it was created
    files = set(commits[1][1])
    assert files - {".gitattributes", "README.md"} == {
        path.name
        for path in checkpoint.iterdir()
        if path.is_file() and path.name not in ("training_args.bin", "trainer_state.json")
    }
    assert {"model.safetensors", "probe.safetensors", "modules.json", "chat_template.jinja"} <= files
    card = ModelCard(commits[1][1]["README.md"].decode())  # made, as the folder has none
    assert card.data.library_name == "transformers"
    assert 'from_pretrained("ada/model"' in card.text and "mlp, 8 wide" in card.text
    # `push_to_hub` of a model writes the same files.
    assert set(commits[2][1]) - {"README.md"} == files - {"README.md"}
    assert hub.repositories["ada/secret"].private and not hub.repositories["ada/model"].private
    assert len(commits) == 3 and commits[1][1].items() <= hub.files("ada/model", "tried").items()


def test_saving_with_a_push_takes_all_that_a_push_does(hub, pushed):
    assert hub.repositories["ada/hidden"].private
    assert len(hub.files("ada/hidden")) == 1  # as it was created
    files = hub.files("ada/hidden", "refs/pr/1")
    assert "model.safetensors.index.json" in files
    assert "sentence-transformers" in ModelCard(files["README.md"].decode()).data.tags


def test_no_token_and_no_path_of_the_pusher_is_in_what_is_pushed_or_printed(hub, pushed):
    _, printed, folder = pushed
    for repository in hub.repositories.values():
        for commits in repository.refs.values():
            for content in commits[-1][1].values():
                for secret in (*TOKENS.values(), str(folder), f"{Path.home()}/"):
                    assert secret.encode() not in content
    assert not any(token in printed for token in TOKENS.values())


def test_a_stranger_loads_it_without_us_and_not_what_is_private(hub, checkpoint, pushed, tmp_path):
    revision = hub.repositories["ada/model"].refs["main"][1][0]
    answers, _ = run_client(hub, tmp_path, STRANGER.format(revision=revision), user="bob")
    assert answers["embedding"] == pytest.approx(expected_embedding(checkpoint), abs=1e-5)
    assert answers["speaks"][0] == 1
    assert "OSError" in answers["others_repository"]


FAULTS = """
from hf_unigd.cli.main import main
def push(repo_id, *more):
    return outcome(lambda: main(["push", "--folder", {folder!r}, "--repo_id", repo_id, *more]))
answers["wrong_token"] = push("ada/other", "--token", "hf_wrong")
answers["name_taken"] = push("bob/model")
answers["broken_off"] = push("ada/broken")
answers["again"] = push("ada/broken")
answers["no_checkpoint"] = outcome(lambda: main(["push", "--folder", "/", "--repo_id", "ada/x"]))
"""


def test_pushes_that_fail_say_why_and_commit_nothing(hub, checkpoint, tmp_path):
    hub.large_files.clear()
    hub.failing_uploads = 1
    answers, _ = run_client(hub, tmp_path, FAULTS.format(folder=str(checkpoint)))
    assert "wrong" in answers["wrong_token"] and "--token" in answers["wrong_token"]
    assert "ada/other" not in hub.repositories
    assert "may not write there" in answers["name_taken"] and "bob/model" not in hub.repositories
    assert answers["broken_off"].startswith("SystemExit: hf-unigd push: ") and answers["again"] == "None"
    assert "holds no checkpoint" in answers["no_checkpoint"]
    commits = hub.repositories["ada/broken"].refs["main"]
    assert [len(files) > 1 for _, files in commits] == [False, True]  # created, then whole at once
    assert set(commits[1][1]) == set(hub.repositories["ada/model"].refs["main"][1][1])


OTHER_KINDS = """
from hf_unigd.cli.main import main
def push(folder, repo_id, *more):
    return outcome(lambda: main(["push", folder, repo_id, *more]))
answers["pushes"] = [push({adapter!r}, "ada/changed"), push({whole!r}, "ada/changed")]
answers["public"] = push({whole!r}, "ada/changed", "--private", "true")
answers["public_pull_request"] = push({whole!r}, "ada/changed", "--private", "true", "--create_pr", "true")
answers["local_base"] = push({local!r}, "ada/local")
"""


@pytest.fixture(scope="module")
def other_kinds(hub, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    folders = {"whole": checkpoint, "adapter": folder / "adapter", "local": folder / "local"}
    for name, base in {"adapter": "ada/base", "local": str(checkpoint)}.items():
        shutil.copytree(checkpoint, folders[name], ignore=shutil.ignore_patterns("model.safetensors"))
        save_file({"weight": torch.zeros(1)}, folders[name] / "adapter_model.safetensors")
        (folders[name] / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    code = OTHER_KINDS.format(**{name: str(path) for name, path in folders.items()})
    return run_client(hub, folder, code)[0]


def test_a_whole_checkpoint_takes_the_place_of_an_adapter(hub, checkpoint, other_kinds):
    assert other_kinds["pushes"] == ["None", "None"]
    _, adapter, whole = (set(files) for _, files in hub.repositories["ada/changed"].refs["main"])
    assert {"adapter_config.json", "adapter_model.safetensors"} == adapter - whole
    assert {"model.safetensors"} == whole - adapter


def test_what_should_be_private_is_not_pushed_where_all_can_read_it(hub, other_kinds):
    for answer in (other_kinds["public"], other_kinds["public_pull_request"]):
        assert "ada/changed exists already and is public" in answer and "Make it private" in answer
    assert list(hub.repositories["ada/changed"].refs) == ["main"]


def test_an_adapter_on_a_folder_of_this_machine_is_not_pushed(hub, checkpoint, other_kinds):
    for part in ("adapter_config.json", str(checkpoint), "Push the base model first", "hf-unigd merge"):
        assert part in other_kinds["local_base"]
    assert "ada/local" not in hub.repositories


OFFLINE = """
import time
time.sleep = lambda seconds: None  # the client's pauses before it tries again, 23 s for each file
from hf_unigd import UniGDModel, UniGDProcessor
answers["cached"] = outcome(lambda: UniGDModel.from_pretrained("ada/model").embedding_head.projection[0].weight.shape)
answers["cached_processor"] = outcome(lambda: type(UniGDProcessor.from_pretrained("ada/model")).__name__)
answers["not_cached"] = outcome(lambda: UniGDModel.from_pretrained("ada/elsewhere"))
"""


@pytest.mark.parametrize("how", ["dead endpoint", "HF_HUB_OFFLINE"])
def test_without_a_network_the_cached_copy_loads_and_others_are_named(hub, pushed, how):
    _, _, folder = pushed  # with its cache
    dead = {"endpoint": "http://127.0.0.1:9"} if how == "dead endpoint" else {"HF_HUB_OFFLINE": "1"}
    answers, _ = run_client(hub, folder, OFFLINE, **dead)
    assert "[32, 32]" in answers["cached"]
    assert answers["cached_processor"] == "UniGDProcessor"
    assert answers["not_cached"].startswith("OSError: We couldn't connect to")

"""The unmodified client against a hub on the loopback: pushes, pulls, pull requests, and all that goes wrong."""

from pathlib import Path

import pytest
import torch
from hub.hub_client import TOKENS, run_client
from hub.hub_server import running_hub

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
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
    assert files - {".gitattributes"} == {
        path.name for path in checkpoint.iterdir() if path.is_file() and path.name != "training_args.bin"
    }
    assert {"model.safetensors", "probe.safetensors", "modules.json", "chat_template.jinja"} <= files
    # `push_to_hub` of a model writes the same files.
    assert set(commits[2][1]) - {"README.md"} == files - {"README.md"}
    assert hub.repositories["ada/secret"].private and not hub.repositories["ada/model"].private


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

"""Pushing a saved checkpoint, whole or an adapter, in one commit."""

import json
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, HfHubHTTPError, filter_repo_objects

from .cards import is_hub_id, make_model_card


# What training leaves beside a checkpoint: it says where and how the run was made, and loads nothing.
TRAINING_STATE = (
    "checkpoint-*/**",
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "scaler*",
    "training_args.bin",
    "trainer_state.json",
    "global_step*/**",
    "latest",
    "zero_to_*.py",
    "pytorch_model_fsdp*",
    "runs/**",
    "wandb/**",
    "events.out.tfevents*",
    "**/events.out.tfevents*",
    "_*",
)
# What would win over the new files where another kind of checkpoint was pushed there before.
REPLACED = (
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "probe.safetensors",
)


def push_checkpoint(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str = "Upload of a checkpoint by hf-unigd",
) -> CommitInfo:
    """
    Uploads what a user of the checkpoint needs, and nothing else, in one commit: the repository shows all of it or,
    where the upload breaks off, none of it. Doing it again sends only what is not there yet. Weights, adapter and
    probe of an earlier push that this one does not replace are removed with it. Where neither folder nor repository
    has a model card, one is written, of what the checkpoint itself tells.

    Args:
        folder: What `save_pretrained` or the trainer wrote.
        repo_id: Where to; created where it does not exist.
        private: Whether a new repository is private; the owner's default where not given. A public one that exists
            already is refused where it is true.
        revision: Branch to commit to; created where it does not exist.
        create_pr: Open a pull request instead of committing to the branch.
        token: Of the Hub; the one that was logged in with by default.

    Raises:
        ValueError: the folder holds no checkpoint, or an adapter on a model that is not on the Hub; the repository is
            public and should be private; or the Hub refuses.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"{folder} holds no checkpoint: there is neither config.json nor adapter_config.json.")
    if not (folder / "processor_config.json").is_file():
        raise ValueError(
            f"{folder} has no processor, without which nobody can use the checkpoint. Save it there too: "
            f"`processor.save_pretrained({str(folder)!r})`."
        )
    whole = ("model.safetensors", "model.safetensors.index.json")
    if (folder / "adapter_config.json").is_file() and any((folder / name).is_file() for name in whole):
        raise ValueError(
            f"{folder} holds a whole model and an adapter, of which one is left from before. Remove it, or save to "
            "another folder."
        )
    adapter_file, base = folder / "adapter_config.json", None
    if adapter_file.is_file():
        base = json.loads(adapter_file.read_text(encoding="utf-8"))["base_model_name_or_path"]
        check_base_is_on_hub(base)
    names = pushed_files(folder)
    additions = [CommitOperationAdd(name, folder / name) for name in sorted(names)]
    api = HfApi(token=token)
    try:
        if not create_pr:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private:
            check_is_private(api, repo_id)
        if not create_pr and revision not in (None, "main"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=revision)
        if REPOCARD_NAME not in {*names, *there}:
            additions.append(CommitOperationAdd(REPOCARD_NAME, _make_card(folder, repo_id, base).encode()))
        stale = filter_repo_objects(there, allow_patterns=list(REPLACED))
        # Not `upload_folder`, which commits a large folder in parts.
        return api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(path) for path in stale if path not in names)],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    except (HfHubHTTPError, RuntimeError) as error:  # the client raises the second where an upload breaks off
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        remedy = {
            401: "The token is missing or wrong: `hf auth login`, or `--token`.",
            403: "The token may not write there: take a name of your own, or `--create_pr true`.",
        }.get(status, "Nothing was committed; doing it again goes on with what is missing.")
        reason = getattr(error, "server_message", None) or error
        raise ValueError(f"{repo_id}: {reason} {remedy}") from error


def pushed_files(folder: str | Path) -> set[str]:
    """What a push takes of a folder, as paths in it: all but what training left there."""
    folder = Path(folder)
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return set(filter_repo_objects(files, ignore_patterns=[*TRAINING_STATE, *DEFAULT_IGNORE_PATTERNS]))


def check_is_private(api: HfApi, repo_id: str) -> None:
    """
    Raises:
        ValueError: all can read the repository.
    """
    if not api.model_info(repo_id).private:
        raise ValueError(
            f"{repo_id} exists already and is public, so nothing was uploaded. Make it private first (its settings on "
            "the Hub), or take another name."
        )


def check_base_is_on_hub(base: str | None) -> None:
    """
    Raises:
        ValueError: the model beneath an adapter is not where those who load the adapter would find it.
    """
    if not is_hub_id(base):
        raise ValueError(
            f"The adapter is on {base!r}, which is not on the Hub, so nobody could load it. Push that model first and "
            "write its id into adapter_config.json as `base_model_name_or_path`, or push what "
            "`hf-unigd merge ADAPTER --output DIR` writes."
        )


def _make_card(folder: Path, repo_id: str, base: str | None) -> str:
    config = folder / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    head = {"head": f"{settings['head_type']}, {settings['embedding_dim']} wide"} if settings else {}
    card = make_model_card(
        repo_id=repo_id,
        title=repo_id.rpartition("/")[2],
        summary=f"an adapter on {base}." if base else "a whole model.",
        training={**head, "how": "not recorded"},
        limits="Nobody has described them. The card was made of the checkpoint's files, which came without one.",
        methods=(),
        base_model=base,
        base_model_relation="adapter",
    )
    return str(card)

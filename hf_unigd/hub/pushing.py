"""Pushing a saved checkpoint to the Hub, in one commit."""

import json
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, HfHubHTTPError, filter_repo_objects

from .cards import is_hub_id, make_model_card


# What training leaves beside a checkpoint. It tells about the run, and no user of the checkpoint needs it.
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
# Files of another kind of checkpoint, pushed before, that would be loaded instead of the new ones.
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
    Uploads what a user of the checkpoint needs, and nothing else, in one commit. The repository shows all of it or, if
    the upload is interrupted, none of it. Another call then sends only what is still missing. Weights, adapter and
    probe of an earlier push are removed in the same commit if this push does not replace them. If neither the folder
    nor the repository has a model card, one is written from the checkpoint's own files.

    Args:
        folder: The folder that `save_pretrained` or the trainer wrote.
        repo_id: The repository, which is created if it does not exist.
        private: Whether a new repository is private; by default the owner's setting decides. If True, an existing
            public repository is refused.
        revision: Branch to commit to, which is created if it does not exist.
        create_pr: Open a pull request instead of committing to the branch.
        token: Token of the Hub; by default the one that the user logged in with.

    Returns:
        The commit.

    Raises:
        ValueError: the folder holds no checkpoint, or an adapter whose base model is not on the Hub; the repository is
            public although it should be private; or the Hub refuses the commit.
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
            f"{folder} holds a whole model and an adapter, one of them from an earlier save. Remove that one, or save "
            "to another folder."
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
    except (HfHubHTTPError, RuntimeError) as error:  # the client raises a RuntimeError for an interrupted upload
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        remedy = {
            401: "The token is missing or wrong: `hf auth login`, or `--token`.",
            403: "The token may not write there: choose a name of your own, or pass `--create_pr true`.",
        }.get(status, "Nothing was committed; another push sends what is still missing.")
        reason = getattr(error, "server_message", None) or error
        raise ValueError(f"{repo_id}: {reason} {remedy}") from error


def pushed_files(folder: str | Path) -> set[str]:
    """Paths of the files that a push uploads, relative to `folder`: all but what training left there."""
    folder = Path(folder)
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return set(filter_repo_objects(files, ignore_patterns=[*TRAINING_STATE, *DEFAULT_IGNORE_PATTERNS]))


def check_is_private(api: HfApi, repo_id: str) -> None:
    """
    Raises:
        ValueError: the repository is public.
    """
    if not api.model_info(repo_id).private:
        raise ValueError(
            f"{repo_id} exists already and is public, so nothing was uploaded. Make it private first (in its settings "
            "on the Hub), or choose another name."
        )


def check_base_is_on_hub(base: str | None) -> None:
    """
    Raises:
        ValueError: the base model of an adapter is not on the Hub, where users of the adapter would look for it.
    """
    if not is_hub_id(base):
        raise ValueError(
            f"The adapter's base model is {base!r}, which is not on the Hub, so nobody could load the adapter. Push "
            "the base model first and write its id into adapter_config.json as `base_model_name_or_path`, or push "
            "what `hf-unigd merge ADAPTER --output DIR` writes."
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
        limits="They are not described: this card was generated from the checkpoint's files.",
        methods=(),
        base_model=base,
        base_model_relation="adapter",
    )
    return str(card)

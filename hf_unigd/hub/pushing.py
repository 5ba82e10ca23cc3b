"""Pushing a saved checkpoint, whole or an adapter, in one commit."""

from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.utils import HfHubHTTPError


# What training leaves beside a checkpoint: it says where and how the run was made, and loads nothing.
TRAINING_STATE = (
    "checkpoint-*/**",
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "scaler*",
    "training_args.bin",
    "runs/**",
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
    where the upload breaks off, none of it. Doing it again sends only what is not there yet.

    Args:
        folder: What `save_pretrained` or the trainer wrote.
        repo_id: Where to; created where it does not exist.
        private: Whether a new repository is private; the owner's default where not given.
        revision: Branch to commit to; created where it does not exist.
        create_pr: Open a pull request instead of committing to the branch.
        token: Of the Hub; the one that was logged in with by default.

    Raises:
        ValueError: the folder holds no checkpoint, or the Hub refuses.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"{folder} holds no checkpoint: there is neither config.json nor adapter_config.json.")
    if not (folder / "processor_config.json").is_file():
        raise ValueError(
            f"{folder} has no processor, without which nobody can use the checkpoint. Save it there too: "
            f"`processor.save_pretrained({str(folder)!r})`."
        )
    api = HfApi(token=token)
    try:
        if not create_pr:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None and revision != "main":
                api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            ignore_patterns=list(TRAINING_STATE),
        )
    except (HfHubHTTPError, RuntimeError) as error:  # the client raises the second where an upload breaks off
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        remedy = {
            401: "The token is missing or wrong: `hf auth login`, or `--token`.",
            403: "The token may not write there: take a name of your own, or `--create_pr true`.",
        }.get(status, "Nothing was committed; doing it again goes on with what is missing.")
        reason = getattr(error, "server_message", None) or error
        raise ValueError(f"{repo_id}: {reason} {remedy}") from error

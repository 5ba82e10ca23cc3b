"""Pushing a saved checkpoint, or the folder of a Space, to the Hub in one commit."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import starmap
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.utils import HfHubHTTPError, filter_repo_objects

from ..modeling.digests_unigd import DIGESTED_FILES, DIGESTS_NAME
from ..modeling.probe_unigd import PROBE_NAME
from .cards import is_hub_id, make_model_card


logger = logging.getLogger(__name__)

# What a checkpoint is made of, by the names of its files. Everything else stays where it is: the state of training,
# logs, and whatever else lies in the folder.
CHECKPOINT_FILES = (
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"),
    *DIGESTED_FILES,
    *(DIGESTS_NAME, "metrics.json", "README.md", "LICENSE", "LICENSE.*"),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
)
# The same in the folders of sentence-transformers' modules, which `modules.json` names.
MODULE_FILES = ("config.json", "model.safetensors")
# Files of another kind of checkpoint, pushed before, that would be loaded instead of the new ones.
REPLACED = (
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    PROBE_NAME,
    DIGESTS_NAME,
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
    Uploads the files that a checkpoint is made of, and nothing else, in one commit. What stays behind is logged. The
    repository shows all of it or, if the upload is interrupted, none of it. Another call then sends only what is still
    missing. Weights, adapter, probe and digests of an earlier push are removed in the same commit if this push does
    not replace them. If neither the folder nor the repository has a model card, one is written from the checkpoint's
    own files.

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
            public although it should be private; a file is a link to one outside the folder; or the Hub refuses the
            commit.
    """
    folder = Path(folder)
    base = check_checkpoint(folder)
    names = pushed_files(folder)
    stays = left_behind(folder)
    if stays:
        logger.warning("Not uploaded, because a checkpoint is not made of it: %s", ", ".join(stays))
    additions = [CommitOperationAdd(name, folder / name) for name in sorted(names)]
    api = HfApi(token=token)
    with _explained(repo_id, "choose a name of your own, or pass `--create_pr true`."):
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


def push_space(folder: str | Path, repo_id: str, private: bool | None = None, token: str | None = None) -> CommitInfo:
    """
    Makes a folder all that a Docker Space holds, in one commit.

    Args:
        folder: What [`~hf_unigd.serving.space.write_space`] wrote.
        repo_id: The Space, which is created if it does not exist.
        private, token: As in [`push_checkpoint`].

    Returns:
        The commit.

    Raises:
        ValueError: the Space is public although it should be private, or the Hub refuses the commit.
    """
    names = {file.relative_to(folder).as_posix(): file for file in sorted(Path(folder).rglob("*")) if file.is_file()}
    api = HfApi(token=token)
    with _explained(repo_id, "choose a name of your own."):
        space = api.create_repo(repo_id, repo_type="space", space_sdk="docker", private=private, exist_ok=True)
        if private:
            check_is_private(api, space.repo_id, "space")
        there = api.list_repo_files(space.repo_id, repo_type="space")
        stale = [path for path in there if path not in names and path != ".gitattributes"]
        return api.create_commit(
            space.repo_id,
            [*starmap(CommitOperationAdd, names.items()), *map(CommitOperationDelete, stale)],
            commit_message="Upload of a Space by hf-unigd",
            repo_type="space",
        )


def check_checkpoint(folder: str | Path) -> str | None:
    """
    The base model of the adapter in a folder, or None if it holds a whole model.

    Raises:
        ValueError: the folder holds no checkpoint that others could use, or an adapter whose base model is not on the
            Hub.
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
    adapter_file = folder / "adapter_config.json"
    if not adapter_file.is_file():
        return None
    base = json.loads(adapter_file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    check_base_is_on_hub(base)
    return base


def pushed_files(folder: str | Path) -> set[str]:
    """
    Paths of the files that a push uploads, relative to `folder`: those that a checkpoint is made of, and the pictures
    that its card shows.

    Raises:
        ValueError: one of them is a link to a file outside the folder.
    """
    folder = Path(folder)
    wanted = {file.relative_to(folder).as_posix() for name in CHECKPOINT_FILES for file in folder.glob(name)}
    wanted |= {f"{module}/{name}" for module in _module_folders(folder) for name in MODULE_FILES}
    wanted |= set(_pictures(folder / REPOCARD_NAME))
    files = {name for name in wanted if (folder / name).is_file()}
    for name in sorted(files):
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{folder / name} is a link to {(folder / name).resolve()}, outside the checkpoint. Replace the link "
                "by the file if it shall be uploaded."
            )
    return files


def left_behind(folder: str | Path) -> list[str]:
    """What lies in a checkpoint's folder and is not uploaded, by name. A folder of it stands for its files."""
    names = {name.partition("/")[0] for name in pushed_files(folder)}
    return sorted(path.name + "/" * path.is_dir() for path in Path(folder).iterdir() if path.name not in names)


def _module_folders(folder: Path) -> list[str]:
    file = folder / "modules.json"
    if not file.is_file():
        return []
    paths = [module.get("path", "") for module in json.loads(file.read_text(encoding="utf-8"))]
    return [path for path in paths if re.fullmatch(r"[\w-]+", path)]


def _pictures(card: Path) -> list[str]:
    """Files beside a model card that it shows as pictures."""
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    return re.findall(r"!\[[^\]]*\]\(([\w.-]+)\)", text)


def check_is_private(api: HfApi, repo_id: str, repo_type: str = "model") -> None:
    """
    Raises:
        ValueError: the repository is public.
    """
    if not api.repo_info(repo_id, repo_type=repo_type).private:
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


@contextmanager
def _explained(repo_id: str, if_forbidden: str) -> Iterator[None]:
    """Tells what the Hub refuses, and what helps."""
    try:
        yield
    except (HfHubHTTPError, RuntimeError) as error:  # the client raises a RuntimeError for an interrupted upload
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        remedy = {
            401: "The token is missing or wrong: `hf auth login`, or `--token`.",
            403: f"The token may not write there: {if_forbidden}",
        }.get(status, "Nothing was committed; another push sends what is still missing.")
        reason = getattr(error, "server_message", None) or error
        raise ValueError(f"{repo_id}: {reason} {remedy}") from error


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

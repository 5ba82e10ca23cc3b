"""The folder that a training run writes to."""

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import CHAT_TEMPLATE_DIR

from ..hub.cards import CURVES_NAME
from ..hub.pushing import CHECKPOINT_FILES
from ..modeling import UniGDConfig
from ..outputs import check_writable


# What a run writes beside the files of a checkpoint: checkpoints, the folders of sentence-transformers' modules, ...
_WRITTEN = (*CHECKPOINT_FILES, "checkpoint-[0-9]*", "[0-9]_*", CHAT_TEMPLATE_DIR, CURVES_NAME, TRAINING_ARGS_NAME)


def check_output_folder(folder: str | Path, *more: str) -> None:
    """
    Args:
        folder: The folder that a run is about to write to.
        more: What it will write there beside the model, by name.

    Raises:
        ValueError: the folder cannot be written, or it holds files that the run would replace, and no run wrote them.
    """
    folder = Path(folder)
    check_writable(folder)
    if not folder.is_dir() or any(map(_is_model, (folder, *checkpoints_in(folder)))):
        return
    names = (*_WRITTEN, *more)
    foreign = sorted(file.name for file in folder.iterdir() if any(fnmatch(file.name, name) for name in names))
    if foreign:
        raise ValueError(
            f"The output folder {folder} holds {', '.join(foreign)}, which would be replaced and which no run of "
            "hf-unigd wrote. Name another folder."
        )


def checkpoints_in(folder: str | Path) -> Iterator[Path]:
    """The checkpoints of a run, complete or not, the last first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    yield from sorted(found, key=lambda path: -int(path.name.rpartition("-")[2]))


def _is_model(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config["model_type"] == UniGDConfig.model_type
    except (OSError, ValueError, LookupError, TypeError):
        return False

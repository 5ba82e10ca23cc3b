"""Writes the files by which sentence-transformers loads a folder as a pipeline of modules."""

import json
from collections.abc import Sequence
from pathlib import Path


SENTENCE_CONFIG_NAME = "config_sentence_transformers.json"


def save_sentence_files(
    folder: str | Path, modules: Sequence[tuple[str, str, dict]], prompts: dict[str, str] | None = None
) -> None:
    """
    Writes `modules.json`, the settings of the modules and those of the whole pipeline.

    Args:
        folder: The checkpoint's folder.
        modules: The folder of each module inside `folder` (`""` for the first, which is the checkpoint itself), the
            full name of its class, and its settings.
        prompts: The instructions by name, which `encode_query`, `encode_document` and `prompt_name` use.
    """
    folder = Path(folder)
    entries = [
        {"idx": idx, "name": str(idx), "path": path, "type": kind} for idx, (path, kind, _) in enumerate(modules)
    ]
    pipeline: dict[str, object] = {
        "similarity_fn_name": "cosine",
        "prompts": prompts or {},
        "default_prompt_name": None,
    }
    files: dict[str, object] = {"modules.json": entries, SENTENCE_CONFIG_NAME: pipeline}
    for path, _, settings in modules:
        files[f"{path}/config.json" if path else "sentence_bert_config.json"] = settings
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

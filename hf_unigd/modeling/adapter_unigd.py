"""Adapters: checkpoints of what was trained alone (LoRA, soft prompts, head), which name the model beneath them."""

import json
from pathlib import Path

from .configuration_unigd import UniGDConfig
from .hub_files_unigd import find_file, hub_arguments
from .processing_unigd import UniGDProcessor


ADAPTER_CONFIG_NAME = "adapter_config.json"
# Said of the adapter, not of the model beneath it: where it lies, and that its code is trusted.
_OF_THE_ADAPTER = {"revision", "subfolder", "trust_remote_code"}


def is_adapter(name, kwargs: dict) -> bool:
    """Whether a folder or Hub repository holds an adapter. Of `kwargs` is used what says where to load from."""
    return find_file(name, ADAPTER_CONFIG_NAME, kwargs) is not None


def load_base_model(model_class, name, processor: UniGDProcessor, check_probe: bool = True, **kwargs):
    """
    The model beneath an adapter, ready to receive it: a head of the adapter's shape, and rows for its soft prompts.

    Args:
        model_class: Class to load, [`UniGDModel`] or [`UniGDForConditionalGeneration`].
        name (`str` or `os.PathLike`): Folder or Hub id of the adapter.
        processor ([`UniGDProcessor`]): Processor of the adapter.
        check_probe (`bool`, *optional*, defaults to `True`): Check the probe of the model beneath.
        kwargs: Arguments of `from_pretrained`. `revision` and `subfolder` are the adapter's; the model beneath has the
            revision that the adapter names, and its own remote code, if any, is not run.

    Raises:
        ValueError: the adapter names no model beneath it.
    """
    where = hub_arguments(kwargs)
    config = UniGDConfig.from_pretrained(name, **where)
    adapter_config = json.loads(Path(find_file(name, ADAPTER_CONFIG_NAME, where) or "").read_text(encoding="utf-8"))
    base = adapter_config["base_model_name_or_path"]
    if not base:
        raise ValueError(
            f"{ADAPTER_CONFIG_NAME} of {name} names no model beneath it, as the adapter was trained on one that was "
            "made in memory. Write the folder or Hub id of that model into its `base_model_name_or_path`."
        )
    kwargs = {key: value for key, value in kwargs.items() if key not in _OF_THE_ADAPTER}
    if adapter_config.get("revision"):
        kwargs["revision"] = adapter_config["revision"]
    where = hub_arguments(kwargs)
    base_config, _ = UniGDConfig.get_config_dict(base, **where)
    if base_config.get("model_type") == UniGDConfig.model_type:
        model = model_class.from_pretrained(base, check_probe=check_probe, **kwargs)
    else:
        names = ("head_type", "embedding_dim", "head_hidden_dim", "matryoshka_dims")
        model = model_class.from_vlm_pretrained(base, **{key: getattr(config, key) for key in names}, **kwargs)
    if processor.soft_prompts:
        model.add_soft_prompts(**processor.soft_prompt_tokens)
    model.processor = processor
    return model

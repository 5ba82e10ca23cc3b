"""Adapters: checkpoints that hold only what was trained (LoRA, soft prompts, head), and name their base model."""

import inspect
import json
import math
from pathlib import Path

from .configuration_unigd import UniGDConfig
from .hub_files_unigd import find_file, hub_arguments
from .loading_info_unigd import raise_if_random
from .probe_unigd import PROBE_NAME, load_probe
from .processing_unigd import UniGDProcessor


ADAPTER_CONFIG_NAME = "adapter_config.json"
TEMPERATURE = "embedding_head.logit_scale"
CONFIG_ARGUMENTS = inspect.signature(UniGDConfig.__init__).parameters.keys() - {"self", "vlm_config", "kwargs"}
# Arguments about the adapter, not about its base model: where the adapter is, and that its code is trusted.
_ADAPTER_ARGUMENTS = {"revision", "subfolder", "trust_remote_code"}


def is_adapter(name, kwargs: dict) -> bool:
    """Whether a folder or Hub repository holds an adapter. `kwargs` are those of a `from_pretrained`."""
    return find_file(name, ADAPTER_CONFIG_NAME, kwargs) is not None


def load_with_adapter(model_class, name, check_probe: bool = True, **kwargs):
    """
    Loads the base model of an adapter and puts the adapter on it, without merging it. The model's `processor` is the
    adapter's.

    Args:
        model_class: Class to load, [`UniGDModel`] or [`UniGDForConditionalGeneration`].
        name (`str` or `os.PathLike`): Folder or Hub id of the adapter.
        check_probe (`bool`, *optional*, defaults to `True`): Whether to check the probes of the base model and of the
            adapter's processor. The adapted model's own is the caller's to check.
        kwargs: Arguments of `from_pretrained`. `revision` and `subfolder` are the adapter's. The base model has the
            revision that the adapter names, and its own remote code, if any, is not run.

    Returns:
        The model, and the loading info of the adapter (`dict`).

    Raises:
        ValueError: the adapter names no base model.
        RuntimeError: a tensor would be random; or neither the adapter nor its base model has a trained head.
    """
    where = hub_arguments(kwargs)
    processor = UniGDProcessor.from_pretrained(name, check_probe=check_probe, **where)
    model, head_is_new = _load_base_model(model_class, name, check_probe, kwargs)
    new_tensors = [f"embedding_head.{key}" for key in model.embedding_head.state_dict()] if head_is_new else []
    reserved = set(model.vlm.generation_config.suppress_tokens or [])
    if not reserved.issuperset(processor.soft_prompt_ids):  # else they are the base model's, and trained
        model.add_soft_prompts(**processor.soft_prompt_tokens)
    model.processor = processor
    info = model.load_adapter(name, adapter_kwargs=where).to_dict()
    if model.config.tie_word_embeddings:  # the output's soft prompts are the input's, under a second name
        info["missing_keys"] = {key for key in info["missing_keys"] if "lm_head.token_adapter" not in key}
    raise_if_random(name, info)
    saved = model.get_adapter_state_dict().keys()
    _check_head(name, model, [key for key in new_tensors if key not in saved], where)
    return model, info


def _check_head(name, model, new_tensors: list[str], where: dict) -> None:
    """
    Raises if the head of an adapted model is not the one that was trained.

    Args:
        new_tensors: The tensors of the head that neither the adapter nor its base model has. The temperature may be
            one of them: if it was not trained, the config has its value.
    """
    temperature_is_lost = False
    if TEMPERATURE in new_tensors and (probe_file := find_file(name, PROBE_NAME, where)):
        saved = load_probe(probe_file)["inverse_temperature"].log().item()
        temperature_is_lost = not math.isclose(saved, model.config.logit_scale_init_value, abs_tol=1e-3)
    if temperature_is_lost or new_tensors not in ([], [TEMPERATURE]):
        raise RuntimeError(
            f"{name} lacks {', '.join(new_tensors)}, and its base model is a plain one without an embedding head, so "
            "the head would be new at every load. Train with `UniGDTrainer`, or save the adapter from a model made by "
            "`get_peft_model` with `LoraConfig(..., modules_to_save=['embedding_head'])`."
        )


def _load_base_model(model_class, name, check_probe: bool, kwargs: dict):
    """The base model of the adapter `name`, and whether it is a plain one, which gets a new head of the adapter's
    shape."""
    where = hub_arguments(kwargs)
    adapter_config = json.loads(Path(find_file(name, ADAPTER_CONFIG_NAME, where) or "").read_text(encoding="utf-8"))
    base = adapter_config["base_model_name_or_path"]
    if not base:
        raise ValueError(
            f"{ADAPTER_CONFIG_NAME} of {name} names no base model, because the adapter was trained on one that was "
            "made in memory. Write the folder or Hub id of the base model into its `base_model_name_or_path`."
        )
    kwargs = {key: value for key, value in kwargs.items() if key not in _ADAPTER_ARGUMENTS}
    if adapter_config.get("revision"):
        kwargs["revision"] = adapter_config["revision"]
    base_config, _ = UniGDConfig.get_config_dict(base, **hub_arguments(kwargs))
    if base_config.get("model_type") == UniGDConfig.model_type:
        return model_class.from_pretrained(base, check_probe=check_probe, **kwargs), False
    config = UniGDConfig.from_pretrained(name, **where)
    head = {key: getattr(config, key) for key in CONFIG_ARGUMENTS}
    return model_class.from_vlm_pretrained(base, **head, **kwargs), True

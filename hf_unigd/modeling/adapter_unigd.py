"""Adapters: checkpoints that hold only what was trained (LoRA, soft prompts, head), and name their base model."""

import inspect
import math

from .configuration_unigd import UniGDConfig
from .hub_files_unigd import ADAPTER_CONFIG_NAME, find_file, hub_arguments, is_adapter, read_json, weight_files
from .loading_info_unigd import errors_name, raise_if_random
from .plausible_unigd import as_large_as
from .probe_unigd import PROBE_NAME, load_probe
from .processing_unigd import UniGDProcessor


TEMPERATURE = "embedding_head.logit_scale"
CONFIG_ARGUMENTS = inspect.signature(UniGDConfig.__init__).parameters.keys() - {"self", "vlm_config", "kwargs"}
# Arguments about the adapter, not about its base model: where the adapter is, and that its code is trusted.
_ADAPTER_ARGUMENTS = {"revision", "subfolder", "trust_remote_code"}


def load_with_adapter(model_class, name, verify: str = "probe", **kwargs):
    """
    Loads the base model of an adapter and puts the adapter on it, without merging it. The model's `processor` is the
    adapter's.

    Args:
        model_class: Class to load, [`UniGDModel`] or [`UniGDForConditionalGeneration`].
        name (`str` or `os.PathLike`): Folder or Hub id of the adapter.
        verify (`str`, *optional*, defaults to `"probe"`): What to check of the base model and of the adapter's
            processor, as in their `from_pretrained`. To check the adapted model is left to the caller.
        kwargs: Arguments of `from_pretrained`. `revision` and `subfolder` are the adapter's. The base model has the
            revision that the adapter names, and its own remote code, if any, is not run.

    Returns:
        The model, and the loading info of the adapter (`dict`).

    Raises:
        ValueError: the adapter names no base model, or another adapter as its base model.
        RuntimeError: a tensor would be random; or neither the adapter nor its base model has a trained head.
    """
    where = hub_arguments(kwargs)
    base, base_kwargs = _find_base_model(name, kwargs)
    processor = UniGDProcessor.from_pretrained(name, verify=verify, **where)
    base_files = weight_files(base, base_kwargs)  # none if the base model's weights are no safetensors
    with errors_name(name), as_large_as(name, [*base_files, *weight_files(name, where)] if base_files else []):
        model, head_is_new = _load_base_model(model_class, name, base, verify, where, base_kwargs)
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


def _find_base_model(name, kwargs: dict) -> tuple[str, dict]:
    """The name of the base model of the adapter `name`, and the arguments to load it with."""
    config = read_json(find_file(name, ADAPTER_CONFIG_NAME, kwargs) or "")
    base = config.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ValueError(
            f"{ADAPTER_CONFIG_NAME} of {name} names no base model. If the adapter was trained on one that was made in "
            "memory, write the folder or Hub id of the base model into its `base_model_name_or_path`."
        )
    kwargs = {key: value for key, value in kwargs.items() if key not in _ADAPTER_ARGUMENTS}
    if config.get("revision"):
        kwargs["revision"] = config["revision"]
    if is_adapter(base, kwargs):  # it may be this one
        raise ValueError(
            f"{ADAPTER_CONFIG_NAME} of {name} names the base model {base}, which is an adapter itself. Write the "
            "folder or Hub id of a whole model into its `base_model_name_or_path`."
        )
    return base, kwargs


def _load_base_model(model_class, name, base: str, verify: str, where: dict, kwargs: dict):
    """The base model of the adapter `name`, and whether it is a plain one, which gets a new head of the adapter's
    shape."""
    base_config, _ = UniGDConfig.get_config_dict(base, **hub_arguments(kwargs))
    if base_config.get("model_type") == UniGDConfig.model_type:
        return model_class.from_pretrained(base, verify=verify, **kwargs), False
    config = UniGDConfig.from_pretrained(name, **where)
    head = {key: getattr(config, key) for key in CONFIG_ARGUMENTS}
    return model_class.from_vlm_pretrained(base, **head, **kwargs), True

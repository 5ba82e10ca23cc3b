"""One PEFT adapter that holds LoRA, soft prompts and the embedding head."""

import copy
import json
import re
from pathlib import Path

from huggingface_hub.constants import REPOCARD_NAME
from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.dynamic_module_utils import custom_object_save

from ..modeling import UniGDForConditionalGeneration, UniGDProcessor
from ..modeling.adapter_unigd import ADAPTER_CONFIG_NAME


HEAD_NAME = "embedding_head"


def add_adapter(model: UniGDForConditionalGeneration, processor: UniGDProcessor, peft_config: PeftConfig) -> PeftModel:
    """
    Wraps a model so that LoRA, the processor's soft prompts and the embedding head train and are saved together
    (VladVA, section 3.3; PEFT combines LoRA with trained prompts only through `trainable_token_indices`).

    Args:
        model: The model; its parameters are frozen.
        processor: Its processor. Where it has soft prompts, the model must have their tokens (`add_soft_prompts`).
        peft_config: The settings, usually a `LoraConfig`. `target_modules` that are a list of names, or left out (all
            linear layers), are looked for in the language model alone; a string stays the regular expression that it
            is. `modules_to_save` and `trainable_token_indices` are extended by the head and the soft prompts.

    Raises:
        ValueError: the settings have no place for the head or the soft prompts, name layers that do not exist, or are
            made for inference.
    """
    config = copy.deepcopy(peft_config)
    needed = {"target_modules": True, "modules_to_save": True, "trainable_token_indices": bool(processor.soft_prompts)}
    for name, is_needed in needed.items():
        if is_needed and not hasattr(config, name):
            raise ValueError(
                f"`peft_config` is a {type(config).__name__}, which has no `{name}`: the adapter could not hold the "
                "embedding head and the soft prompts. Use a `LoraConfig`."
            )
    if config.inference_mode:
        raise ValueError("`peft_config.inference_mode=True` trains nothing. Leave it out.")
    if not isinstance(config.target_modules, str) or config.target_modules == "all-linear":
        config.target_modules = _target_modules(model, config)
    config.modules_to_save = sorted({*(config.modules_to_save or []), HEAD_NAME})
    if processor.soft_prompts:
        name = _embedding_name(model)
        indices = config.trainable_token_indices or {}
        indices = dict(indices) if isinstance(indices, dict) else {name: indices}
        key = next((key for key in indices if key.rpartition(".")[2] == name), name)
        indices[key] = sorted({*indices.get(key, []), *processor.soft_prompt_ids})
        config.trainable_token_indices = indices
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    # The base model may change on the Hub later; the adapter belongs to this commit.
    commits = (getattr(part, "_commit_hash", None) for part in (model.config, model.vlm.config))
    return get_peft_model(model, config, revision=next(filter(None, commits), None))


def check_adapter(model: PeftModel, processor: UniGDProcessor) -> None:
    """
    Checks that an adapter which the user made trains and saves all that embedding needs.

    Args:
        model: The adapter on a UniGD model.
        processor: The model's processor.

    Raises:
        ValueError: the adapter does not hold the head or the soft prompts, so they would be neither trained nor saved.
    """
    config = model.peft_config[model.active_adapter]
    remedy = "Pass the model without the adapter and your settings as `peft_config`, which adds what is missing."
    if not {HEAD_NAME} <= set(getattr(config, "modules_to_save", None) or []):
        raise ValueError(
            f"`model` is an adapter without {HEAD_NAME!r} in its `modules_to_save`: the embedding head would be "
            f"neither trained nor saved. {remedy}"
        )
    indices = getattr(config, "trainable_token_indices", None) or {}
    held = set().union(*(indices.values() if isinstance(indices, dict) else [indices]))
    if missing := set(processor.soft_prompt_ids) - held:
        raise ValueError(
            f"`model` is an adapter without the soft prompts {sorted(missing)} in its `trainable_token_indices`: they "
            f"would be neither trained nor saved. {remedy}"
        )


def save_adapter_companions(model: PeftModel, folder: str | Path) -> None:
    """
    Writes beside an adapter what PEFT leaves out: config with the head's shape, remote code, generation config, the
    processor, what sentence-transformers needs, and, where this process has the whole model, the probe.

    Raises:
        RuntimeError, ValueError: what was written does not load again to the same embeddings.
    """
    folder = Path(folder)
    config_file = folder / ADAPTER_CONFIG_NAME
    config = json.loads(config_file.read_text(encoding="utf-8"))
    # `AutoPeftModel` loads the base model by this. PEFT would name a module of ours, which others need not have.
    config |= {
        "task_type": None,
        "auto_mapping": {"parent_library": "transformers", "base_model_class": "AutoModelForImageTextToText"},
    }
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    card = folder / REPOCARD_NAME
    if card.is_file() and "[More Information Needed]" in card.read_text(encoding="utf-8"):
        card.unlink()  # PEFT's empty template
    base = model.get_base_model()
    custom_object_save(base, folder, config=base.config)
    base.config.save_pretrained(folder)
    base.generation_config.save_pretrained(folder)
    # An adapter on a model that was made in memory names no base model to open it with.
    base.save_companions(folder, can_be_opened=bool(config["base_model_name_or_path"]))


def _target_modules(model: UniGDForConditionalGeneration, config: PeftConfig) -> str | list[str] | None:
    """The linear layers of the language model that the settings name; all of them where they name nothing."""
    if config.target_modules is None and getattr(config, "target_parameters", None):
        return None
    names = None if isinstance(config.target_modules, str) else config.target_modules
    decoder = model.vlm.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    paths = [f"{prefix}.{name}" for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    linear = {path.rpartition(".")[2] for path in paths}
    missing = set(names or []) - linear
    if missing:
        raise ValueError(f"`lora_target_modules` {sorted(missing)} are not linear layers; there are {sorted(linear)}.")
    names = sorted(names or linear)
    if getattr(config, "layers_to_transform", None) is None:
        return rf"{re.escape(prefix)}\..*\.({'|'.join(names)})"
    # PEFT refuses `layers_to_transform` beside a regular expression, so the chosen layers are listed one by one.
    config.target_modules = names
    chosen = [path for path in paths if check_target_module_exists(config, path)]
    config.layers_to_transform = config.layers_pattern = None
    return chosen


def _embedding_name(model: UniGDForConditionalGeneration) -> str:
    embeddings = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embeddings).rpartition(".")[2]

"""A single PEFT adapter for LoRA, the soft prompts and the embedding head."""

import copy
import json
import re
from pathlib import Path

from huggingface_hub.constants import REPOCARD_NAME
from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers.dynamic_module_utils import custom_object_save

from ..modeling import UniGDForConditionalGeneration, UniGDProcessor
from ..modeling.hub_files_unigd import ADAPTER_CONFIG_NAME
from ..outputs import writing


HEAD_NAME = "embedding_head"


def add_adapter(model: UniGDForConditionalGeneration, processor: UniGDProcessor, peft_config: PeftConfig) -> PeftModel:
    """
    Adds an adapter that trains and saves LoRA, the processor's soft prompts and the embedding head together (VladVA,
    section 3.3). PEFT combines LoRA with trained prompts only through `trainable_token_indices`.

    Args:
        model: The model. Its parameters are frozen.
        processor: The model's processor. If it has soft prompts, the model must have their tokens
            (`add_soft_prompts`).
        peft_config: The settings, usually a `LoraConfig`. If `target_modules` is a list of names, they are matched in
            the language model only. If it is `None` (without `target_parameters`) or `"all-linear"`, it becomes all
            linear layers of the language model. An empty list is no layer: the soft prompts and the head are trained
            without LoRA (VladVA, table 4, row 2). Any other string is a regular expression and is kept.
            `modules_to_save` and `trainable_token_indices` are extended by the head and the soft prompts.

    Raises:
        ValueError: the settings cannot hold the head or the soft prompts, name layers that do not exist, are for
            inference, or would train nothing but the temperature.
    """
    config = copy.deepcopy(peft_config)
    needed = {"target_modules": True, "modules_to_save": True, "trainable_token_indices": bool(processor.soft_prompts)}
    for name, is_needed in needed.items():
        if is_needed and not hasattr(config, name):
            raise ValueError(
                f"`peft_config` is a {type(config).__name__}, which has no `{name}`, so the adapter cannot hold the "
                "embedding head and the soft prompts. Use a `LoraConfig`; with `target_modules=[]`, it trains these "
                "without LoRA."
            )
    if config.inference_mode:
        raise ValueError("`peft_config` has `inference_mode=True`, so nothing would be trained. Leave it out.")
    if not isinstance(config.target_modules, str) or config.target_modules == "all-linear":
        config.target_modules = _target_modules(model, config)
    if (
        config.target_modules == DUMMY_TARGET_MODULES
        and model.config.head_type == "none"
        and not processor.soft_prompts
    ):
        raise ValueError(
            "`peft_config` adapts no layer, and the model has neither soft prompts nor a head, so nothing but the "
            "temperature would be trained. Add soft prompts (`soft_prompts_only`), a head, or layers."
        )
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
    # The base model may change on the Hub, so the adapter records the commit that it was trained on.
    commits = (getattr(part, "_commit_hash", None) for part in (model.config, model.vlm.config))
    return get_peft_model(model, config, revision=next(filter(None, commits), None))


def check_adapter(model: PeftModel, processor: UniGDProcessor) -> None:
    """
    Checks that an adapter made by the user trains and saves the embedding head and the soft prompts.

    Args:
        model: A UniGD model with the adapter.
        processor: The model's processor.

    Raises:
        ValueError: the adapter lacks the head or the soft prompts, so they would be neither trained nor saved.
    """
    config = model.peft_config[model.active_adapter]
    remedy = (
        "Pass the model without the adapter, and your settings as `peft_config`: the trainer adds what is missing."
    )
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
    Writes the files beside an adapter that PEFT does not write: the config with the head's shape, the remote code, the
    generation config, the processor, the files of sentence-transformers and, if this process has the whole model and
    it is not quantised, the probe. PEFT's config is changed so that `AutoPeftModel` loads the base model.

    Args:
        model: A UniGD model with the adapter.
        folder: Folder that PEFT saved the adapter to.

    Raises:
        RuntimeError, ValueError: the saved files do not load, or the loaded model gives other embeddings. This is
            checked if the base model's `verify_saves` is on and the base model has a name.
    """
    folder = Path(folder)
    config_file = folder / ADAPTER_CONFIG_NAME
    config = json.loads(config_file.read_text(encoding="utf-8"))
    # `AutoPeftModel` loads the base model with these. PEFT names a module of hf_unigd, which may not be installed.
    config |= {
        "task_type": None,
        "auto_mapping": {"parent_library": "transformers", "base_model_class": "AutoModelForImageTextToText"},
    }
    with writing(config_file) as file:
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    card = folder / REPOCARD_NAME
    if card.is_file() and "[More Information Needed]" in card.read_text(encoding="utf-8"):
        card.unlink()  # PEFT's empty template
    base = model.get_base_model()
    custom_object_save(base, folder, config=base.config)
    base.config.save_pretrained(folder)
    base.generation_config.save_pretrained(folder)
    # The adapter of a model that was made in memory names no base model, so it cannot be loaded for verification.
    base.save_companions(folder, can_be_opened=bool(config["base_model_name_or_path"]))


def _target_modules(model: UniGDForConditionalGeneration, config: PeftConfig) -> str | list[str] | None:
    """Returns the `target_modules` for the linear layers of the language model that the settings name, or for all of
    them if they do not say."""
    if config.target_modules is not None and not config.target_modules:
        return DUMMY_TARGET_MODULES  # PEFT's name of no layer
    if config.target_modules is None and getattr(config, "target_parameters", None):
        return None
    names = None if isinstance(config.target_modules, str) else config.target_modules
    decoder = model.vlm.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    paths = [f"{prefix}.{name}" for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    linear = {path.rpartition(".")[2] for path in paths}
    missing = set(names or []) - linear
    if missing:
        raise ValueError(
            f"`target_modules` (`--lora_target_modules`) {sorted(missing)} are not linear layers of the language "
            f"model. It has {sorted(linear)}."
        )
    names = sorted(names or linear)
    if getattr(config, "layers_to_transform", None) is None:
        return rf"{re.escape(prefix)}\..*\.({'|'.join(names)})"
    # PEFT refuses `layers_to_transform` with a regular expression, so the layers are listed one by one.
    config.target_modules = names
    chosen = [path for path in paths if check_target_module_exists(config, path)]
    config.layers_to_transform = config.layers_pattern = None
    return chosen


def _embedding_name(model: UniGDForConditionalGeneration) -> str:
    """Returns the name of the input embeddings in their parent module."""
    embeddings = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embeddings).rpartition(".")[2]

"""LoRA, soft prompts and head in one PEFT adapter."""

import copy
import json
import re
from pathlib import Path

from huggingface_hub.constants import REPOCARD_NAME
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers.dynamic_module_utils import custom_object_save

from ..modeling import UniGDForConditionalGeneration, UniGDProcessor
from ..modeling.adapter_unigd import ADAPTER_CONFIG_NAME


def add_adapter(model: UniGDForConditionalGeneration, processor: UniGDProcessor, peft_config: LoraConfig) -> PeftModel:
    """
    Wraps a model so that LoRA, the processor's soft prompts and the embedding head train and are saved together
    (VladVA, section 3.3; PEFT combines LoRA with trained prompts only through `trainable_token_indices`).

    Args:
        model: The model; its parameters are frozen.
        processor: Its processor. Where it has soft prompts, the model must have their tokens (`add_soft_prompts`).
        peft_config: The LoRA settings. `target_modules` that are a list of names, or left out (all linear layers), are
            looked for in the language model alone; a string stays the regular expression that it is.
    """
    config = copy.deepcopy(peft_config)
    if not isinstance(config.target_modules, str) or config.target_modules == "all-linear":
        names = None if isinstance(config.target_modules, str) else config.target_modules
        config.target_modules = _language_model_layers(model, names)
    config.modules_to_save = sorted({*(config.modules_to_save or []), "embedding_head"})
    if processor.soft_prompts:
        embeddings = model.get_input_embeddings()
        name = next(name for name, module in model.named_modules() if module is embeddings)
        config.trainable_token_indices = {name.rpartition(".")[2]: processor.soft_prompt_ids}
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    # The model beneath may move on, where it lies; the adapter is of this commit.
    commits = (getattr(part, "_commit_hash", None) for part in (model.config, model.vlm.config))
    return get_peft_model(model, config, revision=next(filter(None, commits), None))


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
    # `AutoPeftModel` loads the model beneath by this; PEFT would name a module of ours, which others need not have.
    config |= {
        "task_type": None,
        "auto_mapping": {"parent_library": "transformers", "base_model_class": "AutoModelForImageTextToText"},
    }
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    card = folder / REPOCARD_NAME
    if card.is_file() and "[More Information Needed]" in card.read_text(encoding="utf-8"):
        card.unlink()  # PEFT's, without a word of this adapter
    base = model.get_base_model()
    custom_object_save(base, folder, config=base.config)
    base.config.save_pretrained(folder)
    base.generation_config.save_pretrained(folder)
    # An adapter of a model that was made in memory names none to open it with.
    base.save_companions(folder, can_be_opened=bool(config["base_model_name_or_path"]))


def _language_model_layers(model: UniGDForConditionalGeneration, names) -> str:
    """A regular expression of the language model's linear layers of these names; all of them where `names` is None."""
    decoder = model.vlm.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    linear = {name.rpartition(".")[2] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    missing = set(names or []) - linear
    if missing:
        raise ValueError(f"`lora_target_modules` {sorted(missing)} are not linear layers; there are {sorted(linear)}.")
    return rf"{re.escape(prefix)}\..*\.({'|'.join(sorted(names or linear))})"

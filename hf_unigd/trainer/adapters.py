"""LoRA, soft prompts and head in one PEFT adapter."""

import copy
import re

from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn

from ..modeling import UniGDForConditionalGeneration, UniGDProcessor


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
    return get_peft_model(model, config)


def _language_model_layers(model: UniGDForConditionalGeneration, names) -> str:
    """A regular expression of the language model's linear layers of these names; all of them where `names` is None."""
    decoder = model.vlm.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    linear = {name.rpartition(".")[2] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    missing = set(names or []) - linear
    if missing:
        raise ValueError(f"`lora_target_modules` {sorted(missing)} are not linear layers; there are {sorted(linear)}.")
    return rf"{re.escape(prefix)}\..*\.({'|'.join(sorted(names or linear))})"

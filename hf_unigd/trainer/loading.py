"""Loads the model and processor to train from parsed arguments, and prepares those that a trainer is given."""

import math
from os import PathLike
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel, set_seed
from trl import get_peft_config, get_quantization_config

from ..modeling import UniGDConfig, UniGDForConditionalGeneration, UniGDHead, UniGDProcessor
from ..modeling.hub_files_unigd import is_adapter
from ..modeling.instructions_unigd import check_instructions
from ..modeling.prompts_unigd import check_prompts
from .adapters import add_adapter, check_adapter
from .arguments import UniGDModelConfig, UniGDTrainingArguments
from .vision import is_frozen, vision_parameters


def load_for_training(
    model_args: UniGDModelConfig, seed: int = 42
) -> tuple[UniGDForConditionalGeneration, UniGDProcessor, PeftConfig | None]:
    """
    Loads the model `model_args.model_name_or_path`: a UniGD checkpoint, or a plain vision-language model, which gets a
    new head. Soft prompts are added if `model_args.soft_prompts` is set and the processor has none.

    Args:
        model_args: The parsed arguments.
        seed: Seed of the weights of a new head.

    Returns:
        The model, its processor, and the settings of the adapter if `model_args.use_peft` or
        `model_args.soft_prompts_only` is set.

    Raises:
        ValueError: the name is that of an adapter; a UniGD checkpoint has another head, `embedding_position` or
            `image_pooling` than the arguments say; an argument about prompts would have no effect; or the temperature
            is lower than the model allows.
    """
    name, revision = model_args.model_name_or_path, model_args.model_revision
    if is_adapter(name, {"revision": revision}):
        raise ValueError(
            f"{name} is an adapter. `hf-unigd merge {name} --output DIR` makes a full checkpoint, which can be "
            "trained."
        )
    quantization_config = get_quantization_config(model_args)
    kwargs = {
        "revision": revision,
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        "quantization_config": quantization_config,
    }
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    head = {
        "head_type": model_args.head_type,
        "embedding_dim": model_args.embedding_dim,
        "matryoshka_dims": model_args.matryoshka_dims,
    }
    config, _ = UniGDConfig.get_config_dict(name, revision=revision)
    if config.get("model_type") == UniGDConfig.model_type:
        saved = UniGDConfig.from_dict(config)
        if model_args.matryoshka_dims:  # the config adds the full size
            head["matryoshka_dims"] = sorted({*model_args.matryoshka_dims, saved.embedding_dim})
        given = [key for key, value in head.items() if value not in (None, "none", getattr(saved, key))]
        if given:
            raise ValueError(f"{name} already has a head. Leave out {', '.join(f'`{key}`' for key in given)}.")
        model = UniGDForConditionalGeneration.from_pretrained(name, **kwargs)
        processor = UniGDProcessor.from_pretrained(name, revision=revision)
        for key, default in (("embedding_position", "prompt"), ("image_pooling", "mean")):
            if getattr(model_args, key) not in (default, getattr(processor, key)):
                raise ValueError(
                    f"{name} was saved with `{key}={getattr(processor, key)!r}`, which its embeddings depend on. "
                    f"Leave `{key}` out."
                )
    else:
        set_seed(seed)
        model = UniGDForConditionalGeneration.from_vlm_pretrained(name, **kwargs, **head)
        processor = UniGDProcessor.from_vlm_pretrained(
            name,
            embedding_position=model_args.embedding_position,
            image_pooling=model_args.image_pooling,
            revision=revision,
        )
    sides = {"query": model_args.instruction, "document": model_args.document_instruction}
    instructions = processor.instructions | {side: text for side, text in sides.items() if text is not None}
    processor.instructions = check_instructions(instructions, processor.find_reserved)
    _set_prompts(processor, model_args)
    _set_temperature(model, model_args.initial_temperature)
    if model_args.soft_prompts and processor.soft_prompts is None:
        model.add_soft_prompts(**processor.add_soft_prompts())
    if model_args.soft_prompts_only:
        return model, processor, LoraConfig(target_modules=[], task_type=model_args.lora_task_type)
    return model, processor, get_peft_config(model_args)


def _set_prompts(processor: UniGDProcessor, model_args: UniGDModelConfig) -> None:
    """Gives a processor the hand-written prompts of the arguments."""
    arguments = (("image", model_args.image_prompt), ("text", model_args.text_prompt))
    prompts = {modality: prompt for modality, prompt in arguments if prompt is not None}
    given = [f"{modality}_prompt" for modality in prompts]
    if processor.embedding_position != "prompt" and (given or model_args.soft_prompts):
        names = given or ["soft_prompts"]
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in names)} would have no effect with "
            f"`embedding_position={processor.embedding_position!r}`, which embeds without a prompt. Leave it out."
        )
    if processor.soft_prompts and given:
        raise ValueError(
            f"{model_args.model_name_or_path} has soft prompts, which replace the hand-written ones, so "
            f"{' and '.join(f'`{name}`' for name in given)} would have no effect. Leave it out."
        )
    processor.prompts = check_prompts(processor.prompts | prompts, processor.find_reserved)


def _set_temperature(model: UniGDForConditionalGeneration, temperature: float | None) -> None:
    """Sets the temperature from which training starts, unless it is None."""
    if temperature is None:
        return
    scale, limit = -math.log(temperature), model.config.logit_scale_max_value
    if scale > limit + 1e-6:
        raise ValueError(
            f"`initial_temperature={temperature}` is below {math.exp(-limit):g}, to which the model clamps its "
            "temperature (`logit_scale_max_value` of its config). Raise it."
        )
    model.config.logit_scale_init_value = scale
    with torch.no_grad():
        model.embedding_head.logit_scale.fill_(scale)


def resolve_model(
    model: Any, processor: Any, args: UniGDTrainingArguments, peft_config: PeftConfig | None
) -> tuple[PreTrainedModel | PeftModel, UniGDProcessor]:
    """
    Returns the model and processor of a trainer, and loads them if `model` is a name.

    Args:
        model: A UniGD model, a `PeftModel` of one, or the Hub id or folder of a checkpoint or of a plain
            vision-language model.
        processor: The processor. By default, the one that belongs to the model.
        args: The training arguments, which have the seed of a new head.
        peft_config: The settings of the adapter to add, if any.

    Raises:
        TypeError: `model` is something else.
        ValueError: `processor` is something else, the model already has an adapter and `peft_config` is given, or
            its adapter lacks the head or the soft prompts.
    """
    if isinstance(model, (str, PathLike)):
        model, loaded_processor, _ = load_for_training(UniGDModelConfig(model_name_or_path=str(model)), args.seed)
        processor = processor or loaded_processor
    is_peft = isinstance(model, PeftModel)
    base = model.get_base_model() if is_peft else model
    if is_peft and peft_config is not None:
        raise ValueError(
            "`model` is a PeftModel and `peft_config` is given too. Leave out `peft_config`, or merge the adapter "
            "(`model.merge_and_unload()`)."
        )
    if not isinstance(base, UniGDForConditionalGeneration):
        raise TypeError(
            f"`model` must be a UniGDForConditionalGeneration, got {type(base).__name__}. "
            "`UniGDForConditionalGeneration.from_vlm(model)` adds an embedding head to a vision-language model, and "
            "`.from_pretrained(name)` loads a checkpoint with its language-modelling head."
        )
    processor = processor or base.processor or base.processor_of_checkpoint()
    if not isinstance(processor, UniGDProcessor):
        raise ValueError(
            f"`processing_class` must be a UniGDProcessor, got {type(processor).__name__}. "
            "`UniGDProcessor.from_vlm_pretrained(...)` makes one from the processor of a vision-language model."
        )
    if is_peft:
        check_adapter(model, processor)
    return model, processor


def prepare_model(
    model: PreTrainedModel | PeftModel,
    processor: UniGDProcessor,
    args: UniGDTrainingArguments,
    peft_config: PeftConfig | None,
) -> PreTrainedModel | PeftModel:
    """
    Freezes the vision tower if `args.freeze_vision_tower` is set and the temperature if `args.freeze_temperature` is,
    and adds the adapter if there is a `peft_config`.

    Args:
        model, processor: The results of [`resolve_model`].
        args: The training arguments.
        peft_config: The settings of the adapter to add, if any.

    Raises:
        ValueError: `args.vision_cache` is set, but the vision tower is trained, or the adapter cannot be added
            ([`add_adapter`]).
    """
    if args.freeze_vision_tower:
        for parameter in vision_parameters(model):
            parameter.requires_grad_(False)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.processor = processor  # saved with the model
    if peft_config is not None:
        set_seed(args.seed)  # of the adapter's weights
        model = add_adapter(model, processor, peft_config)
    if args.freeze_temperature:
        for module in model.modules():  # an adapter has a head of its own
            if isinstance(module, UniGDHead):
                module.logit_scale.requires_grad_(False)
    if args.vision_cache is not None and not is_frozen(model):
        raise ValueError(
            "`vision_cache` keeps the features of a frozen vision tower, but this one is trained. Set "
            "`freeze_vision_tower=True`, keep LoRA out of the tower, or leave `vision_cache` out."
        )
    return model

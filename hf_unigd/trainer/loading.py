"""The model, processor and adapter settings to train with, from parsed arguments or from what a trainer is given."""

from os import PathLike
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, set_seed
from trl import get_peft_config, get_quantization_config

from ..modeling import UniGDConfig, UniGDForConditionalGeneration, UniGDProcessor
from ..modeling.adapter_unigd import is_adapter
from .adapters import add_adapter, check_adapter
from .arguments import UniGDModelConfig, UniGDTrainingArguments
from .vision import is_frozen, vision_parameters


def load_for_training(
    model_args: UniGDModelConfig, seed: int = 42
) -> tuple[UniGDForConditionalGeneration, UniGDProcessor, PeftConfig | None]:
    """
    Loads what `model_args.model_name_or_path` names, one of our checkpoints or a plain vision-language model, which
    gets a new head; adds soft prompts where asked for and not there yet.

    Args:
        model_args: The parsed arguments.
        seed: Seed of a new head's weights.

    Raises:
        ValueError: the name is an adapter's, or head arguments are given for a checkpoint that has its head already.
    """
    name, revision = model_args.model_name_or_path, model_args.model_revision
    if is_adapter(name, {"revision": revision}):
        raise ValueError(
            f"{name} is an adapter. `hf-unigd merge {name} --output DIR` makes a whole checkpoint of it, which can be "
            "trained on."
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
        given = [key for key, value in head.items() if value not in (None, "none", config.get(key))]
        if given:
            raise ValueError(f"{name} has its head already; leave {', '.join(f'`{key}`' for key in given)} out.")
        model = UniGDForConditionalGeneration.from_pretrained(name, **kwargs)
        processor = UniGDProcessor.from_pretrained(name, revision=revision)
    else:
        set_seed(seed)
        model = UniGDForConditionalGeneration.from_vlm_pretrained(name, **kwargs, **head)
        processor = UniGDProcessor.from_vlm_pretrained(
            name,
            embedding_position=model_args.embedding_position,
            image_pooling=model_args.image_pooling,
            revision=revision,
        )
    if model_args.soft_prompts and processor.soft_prompts is None:
        model.add_soft_prompts(**processor.add_soft_prompts())
    return model, processor, get_peft_config(model_args)


def resolve_model(
    model: Any, processor: Any, args: UniGDTrainingArguments, peft_config: PeftConfig | None
) -> tuple[PreTrainedModel | PeftModel, UniGDProcessor]:
    """
    The model and processor that a trainer was given, loaded where they are names.

    Args:
        model: A model, an adapter on one, or the Hub id or folder of a checkpoint or plain vision-language model.
        processor: Its processor; the model's own by default.
        args: The training arguments, for the seed of a new head.
        peft_config: The settings of an adapter that is to be added.

    Raises:
        TypeError, ValueError: the model or the processor is of another kind, with the remedy.
    """
    if isinstance(model, (str, PathLike)):
        model, loaded_processor, _ = load_for_training(UniGDModelConfig(model_name_or_path=str(model)), args.seed)
        processor = processor or loaded_processor
    is_peft = isinstance(model, PeftModel)
    base = model.get_base_model() if is_peft else model
    if is_peft and peft_config is not None:
        raise ValueError(
            "`model` is a PeftModel and `peft_config` is given too. Pass one of them, or merge the adapter first "
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
            "`UniGDProcessor.from_vlm_pretrained(...)` makes one from a model's own processor."
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
    Freezes what is not trained, and adds the adapter.

    Args:
        model, processor: As [`resolve_model`] returns them.
        args: The training arguments.
        peft_config: The settings of an adapter that is to be added.

    Raises:
        ValueError: features of a vision tower that is trained should be kept.
    """
    if args.freeze_vision_tower:
        for parameter in vision_parameters(model):
            parameter.requires_grad_(False)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.processor = processor  # saved with the model
    if peft_config is not None:
        set_seed(args.seed)  # for the adapter's weights
        model = add_adapter(model, processor, peft_config)
    if args.vision_cache is not None and not is_frozen(model):
        raise ValueError(
            "`vision_cache` keeps what a frozen vision tower computes, and this one is trained. Set "
            "`freeze_vision_tower=True`, keep LoRA out of it, or leave `vision_cache` out."
        )
    return model

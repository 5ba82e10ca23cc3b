"""Model, processor and adapter settings from parsed arguments."""

from peft import PeftConfig
from transformers import set_seed
from trl import get_peft_config, get_quantization_config

from ..modeling import UniGDConfig, UniGDForConditionalGeneration, UniGDProcessor
from .arguments import UniGDModelConfig


def load_for_training(
    model_args: UniGDModelConfig, seed: int = 42
) -> tuple[UniGDForConditionalGeneration, UniGDProcessor, PeftConfig | None]:
    """
    Loads what `model_args.model_name_or_path` names, one of our checkpoints or a plain vision-language model, which
    gets a new head; adds soft prompts where asked for and not there yet.

    Args:
        model_args: The parsed arguments.
        seed: Of a new head's weights.

    Raises:
        ValueError: head arguments for a checkpoint that has its head already.
    """
    name, revision = model_args.model_name_or_path, model_args.model_revision
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

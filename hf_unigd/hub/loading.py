"""Loading a trained checkpoint, whole or an adapter."""

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel
from transformers.utils import cached_file

from ..modeling import UniGDConfig, UniGDForConditionalGeneration, UniGDProcessor


def load_checkpoint(name: str, **kwargs) -> tuple[PreTrainedModel, UniGDProcessor]:
    """
    Model and processor of a checkpoint. An adapter is put on its base model and merged into it.

    Args:
        name: A Hub id or folder that [`UniGDTrainer`] saved.
        kwargs: For `from_pretrained` of the model: `dtype`, `attn_implementation`, `device_map`, ...
    """
    processor = UniGDProcessor.from_pretrained(name)
    if cached_file(name, "adapter_config.json", _raise_exceptions_for_missing_entries=False) is None:
        model = UniGDForConditionalGeneration.from_pretrained(name, **kwargs)
        model.processor = processor
        return model, processor

    config = UniGDConfig.from_pretrained(name)
    base = PeftConfig.from_pretrained(name).base_model_name_or_path
    base_config, _ = UniGDConfig.get_config_dict(base)
    if base_config.get("model_type") == UniGDConfig.model_type:
        model = UniGDForConditionalGeneration.from_pretrained(base, **kwargs)
    else:
        head = {
            key: getattr(config, key) for key in ("head_type", "embedding_dim", "head_hidden_dim", "matryoshka_dims")
        }
        model = UniGDForConditionalGeneration.from_vlm_pretrained(base, **head, **kwargs)
    if processor.soft_prompts:
        model.add_soft_prompts(**processor.soft_prompt_tokens)
    return PeftModel.from_pretrained(model, name).merge_and_unload().eval(), processor

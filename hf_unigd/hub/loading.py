"""Loading a trained checkpoint, whole or an adapter."""

from peft import PeftModel
from transformers import PreTrainedModel

from ..modeling import UniGDForConditionalGeneration, UniGDProcessor
from ..modeling.adapter_unigd import is_adapter, load_base_model


def load_checkpoint(name: str, **kwargs) -> tuple[PreTrainedModel, UniGDProcessor]:
    """
    Model and processor of a checkpoint. An adapter is put on its base model and merged into it.

    Args:
        name: A Hub id or folder that [`UniGDTrainer`] saved.
        kwargs: For `from_pretrained` of the model: `dtype`, `attn_implementation`, `device_map`, ..., and where to
            find it: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        ValueError, RuntimeError: what is loaded is not what was saved; `hf-unigd doctor` says more.
    """
    where = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
    processor = UniGDProcessor.from_pretrained(name, **where)
    if is_adapter(name, kwargs):
        base = load_base_model(UniGDForConditionalGeneration, name, processor, **kwargs)
        model = PeftModel.from_pretrained(base, name, **where).merge_and_unload().eval()
        model._check_probe(name, kwargs)
    else:
        model = UniGDForConditionalGeneration.from_pretrained(name, **kwargs)
    model.processor = processor
    return model, processor

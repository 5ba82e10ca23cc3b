"""Loading a trained checkpoint, whole or an adapter."""

from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import PreTrainedModel

from ..modeling import UniGDForConditionalGeneration, UniGDProcessor
from ..modeling.adapter_unigd import is_adapter, load_base_model


def load_checkpoint(name: str, **kwargs) -> tuple[PreTrainedModel, UniGDProcessor]:
    """
    Model and processor of a checkpoint. An adapter is put on its base model and merged into it.

    Args:
        name: A Hub id or folder that [`UniGDTrainer`] saved.
        kwargs: For `from_pretrained` of the model: `dtype`, `device_map`, `check_probe`, ..., and
            where to find it: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        ValueError, RuntimeError: what is loaded is not what was saved; `hf-unigd doctor` says more.
    """
    where = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
    check_probe = kwargs.get("check_probe", True)
    processor = UniGDProcessor.from_pretrained(name, check_probe=check_probe, **where)
    if is_adapter(name, kwargs):
        base = load_base_model(UniGDForConditionalGeneration, name, processor, **kwargs)
        model = _with_adapter(base, name, where).merge_and_unload().eval()
        if check_probe:
            model._check_probe(name, kwargs)
    else:
        model = UniGDForConditionalGeneration.from_pretrained(name, **kwargs)
    model.processor = processor
    return model, processor


def _with_adapter(base: UniGDForConditionalGeneration, name: str, where: dict) -> PeftModel:
    """As `PeftModel.from_pretrained`, which leaves random what an adapter lacks, and warns."""
    model = PeftModel(base, PeftConfig.from_pretrained(name, **where))
    weights = load_peft_weights(name, device="cpu", **where)
    missing = sorted(get_peft_model_state_dict(model).keys() - weights.keys())
    if missing:
        raise RuntimeError(
            f"{name} would leave tensors random: {missing[:8]}{' ...' if len(missing) > 8 else ''} are not in its "
            "adapter_model.safetensors. Save the adapter again, or take another revision."
        )
    set_peft_model_state_dict(model, weights)
    return model

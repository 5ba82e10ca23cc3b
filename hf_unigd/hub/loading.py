"""Loading a trained checkpoint, which holds a whole model or an adapter."""

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from peft.utils.other import AuxiliaryTrainingWrapper

from ..inputs import reading
from ..modeling import UniGDConfig, UniGDForConditionalGeneration, UniGDProcessor
from ..modeling.adapter_unigd import load_with_adapter
from ..modeling.hub_files_unigd import hub_arguments, is_adapter


def load_checkpoint(name: str, **kwargs) -> tuple[UniGDForConditionalGeneration, UniGDProcessor]:
    """
    Loads the model and the processor of a checkpoint. An adapter is put on its base model and merged into it.

    Args:
        name: A Hub id or folder that [`UniGDTrainer`] saved.
        kwargs: Arguments of the model's `from_pretrained`: `dtype`, `device_map`, `verify`, ..., and where the
            checkpoint is: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        ValueError, RuntimeError: the checkpoint is incomplete, or does not compute what it did when it was saved.
            `hf-unigd doctor` says more.
    """
    with reading(name):
        return _load(name, kwargs)


def load_checkpoint_or_vlm(
    name: str, prompts: dict[str, str] | None = None, **kwargs
) -> tuple[UniGDForConditionalGeneration, UniGDProcessor]:
    """
    Loads a checkpoint as [`load_checkpoint`] does, or else a plain vision-language model, which embeds without a head,
    at prompts.

    Args:
        name: A Hub id or folder.
        prompts: The prompts of a plain model, by modality, in place of the default ones.
        kwargs: As in [`load_checkpoint`].

    Raises:
        ValueError, RuntimeError: as in [`load_checkpoint`]; or a tensor of the plain model is missing.
    """
    with reading(name):
        is_plain = not is_adapter(name, kwargs) and (
            UniGDConfig.get_config_dict(name, **hub_arguments(kwargs))[0].get("model_type") != UniGDConfig.model_type
        )
        if not is_plain:
            return _load(name, kwargs)
        kwargs.pop("verify", None)  # a plain model has no probe
        model = UniGDForConditionalGeneration.from_vlm_pretrained(name, **kwargs)
        model.processor = UniGDProcessor.from_vlm_pretrained(name, prompts, **hub_arguments(kwargs))
        return model, model.processor


def _load(name: str, kwargs: dict[str, Any]) -> tuple[UniGDForConditionalGeneration, UniGDProcessor]:
    where, verify = hub_arguments(kwargs), kwargs.get("verify", "probe")
    if not is_adapter(name, kwargs):
        model = UniGDForConditionalGeneration.from_pretrained(name, **kwargs)
        model.processor = UniGDProcessor.from_pretrained(name, verify=verify, **where)
        return model, model.processor
    model, _ = load_with_adapter(UniGDForConditionalGeneration, name, **kwargs)
    _merge_adapter(model)
    model.verify(name, verify, **where)
    return model, model.processor


def _merge_adapter(model: UniGDForConditionalGeneration) -> None:
    """Merges the adapter that transformers put on a model. `merge_and_unload` is for models that PEFT has wrapped."""
    merged: tuple[str, ...] = ()  # prefixes of the names of what is inside a merged module
    for name, module in list(model.named_modules()):
        if name.startswith(merged):
            continue
        with onload_layer(module):
            if isinstance(module, AuxiliaryTrainingWrapper):
                plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            elif isinstance(module, BaseTunerLayer):
                module.merge()
                plain = module.get_base_layer()
            else:
                continue
        model.set_submodule(name, plain)
        merged += (f"{name}.",)
    model.delete_adapter(list(model.peft_config))  # only its settings are left
    model._weight_conversions = None  # by them, transformers would save the tensors under the adapter's names
    model.requires_grad_(True)  # as after any `from_pretrained`

"""What is asked of a backbone of any family: that it can be composed, its logits, image features and processor."""

import inspect
from types import MethodType
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import ModelOutput


def check_backbone(vlm: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: the model lacks one of the parts that embedding and training use: a language-modelling head, a base
            model that returns hidden states, and a method that encodes images.
    """
    name = type(vlm).__name__
    if vlm.get_output_embeddings() is None:
        raise ValueError(
            f"{name} has no language-modelling head. Pass the class that generates, as `AutoModelForImageTextToText` "
            "loads it."
        )
    if vlm.base_model is vlm:
        raise ValueError(
            f"{name} is not supported: it has no base model (`{name}.base_model`) that returns hidden states without "
            "logits."
        )
    if not hasattr(vlm.base_model, "get_image_features"):
        raise ValueError(
            f"{name} is not supported: its base model has no `get_image_features`, which transformers' decoder-only "
            "vision-language models have."
        )


def backbone_logits(vlm: PreTrainedModel, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    Computes next-token scores as the backbone does, including the scaling and capping that some families apply.

    It runs the backbone's own forward, in which a stand-in for the base model returns `hidden_states`.

    Args:
        vlm (`PreTrainedModel`): The backbone.
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): The `last_hidden_state`
            of its base model.

    Returns:
        `torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`.
    """
    backbone = _AfterBaseModel(vlm, hidden_states)
    return type(vlm).forward(backbone, inputs_embeds=hidden_states, return_dict=True).logits


class _BaseModelOutput:
    """The output of a base model of which only the last hidden state is known."""

    def __init__(self, last_hidden_state):
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index):
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name):  # past keys, image features, ...: the logits do not depend on them
        return None


class _AfterBaseModel:
    """A backbone, seen from its own methods, whose base model has already run."""

    def __init__(self, vlm, last_hidden_state):
        self._vlm = vlm
        setattr(self, vlm.base_model_prefix, lambda *args, **kwargs: _BaseModelOutput(last_hidden_state))

    def __getattr__(self, name):
        value = getattr(self._vlm, name)
        if isinstance(value, MethodType) and value.__self__ is self._vlm:
            return MethodType(value.__func__, self)  # a method of the backbone must see the stand-in too
        return value


def accepts_image_features(vlm: PreTrainedModel) -> bool:
    """Whether the backbone takes the output of its vision tower instead of pixels."""
    return "mm_encoder_outputs" in inspect.signature(vlm.base_model.forward).parameters


def image_features(vlm: PreTrainedModel, inputs: dict) -> ModelOutput:
    """The output of the vision tower and projector, whole, for those of the inputs that they take."""
    encode = vlm.base_model.get_image_features
    names = inspect.signature(encode).parameters.keys() & inputs.keys()
    return encode(**{name: inputs[name] for name in names}, return_dict=True)


def load_backbone_processor(class_name: str, pretrained_model_name_or_path, **kwargs) -> ProcessorMixin:
    """
    Loads the backbone's processor from the files of a saved [`UniGDProcessor`].

    Args:
        class_name (`str`): The name of its class in transformers.
        pretrained_model_name_or_path (`str` or `os.PathLike`): A folder or a Hub id.
        kwargs: Arguments of [`~ProcessorMixin.from_pretrained`].

    Raises:
        ValueError: transformers has no such processor, or the files are damaged.
    """
    processor_class: Any = getattr(transformers, str(class_name), None)
    # Not AutoProcessor: it would find our class again, without end.
    is_processor = inspect.isclass(processor_class) and issubclass(processor_class, ProcessorMixin)
    if not is_processor:
        raise ValueError(
            f"processor_config.json of {pretrained_model_name_or_path} names {class_name!r} as `vlm_processor_class`, "
            "which this version of transformers does not have as the processor of a vision-language model."
        )
    try:
        return processor_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
    except (ImportError, OSError, ValueError):
        raise
    except Exception as error:  # a plain `Exception` of the tokenizers library, or whatever a wrong value leads to
        raise ValueError(
            f"The files of the processor of {pretrained_model_name_or_path} are damaged: {error}. Save or download "
            "them again."
        ) from error

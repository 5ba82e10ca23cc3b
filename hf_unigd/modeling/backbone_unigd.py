"""What is asked of a backbone, whatever its family: that it can be composed, its logits, and its image features."""

import inspect
from types import MethodType

import torch
from transformers import PreTrainedModel
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

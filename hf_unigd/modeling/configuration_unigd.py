"""Configuration of a vision-language model with an embedding head."""

import math
from collections.abc import Iterable

from transformers import AutoConfig, PreTrainedConfig

from .plausible_unigd import check_sizes


CHECKPOINT_FORMAT = 1
HEAD_TYPES = ("none", "linear", "mlp")
LOG_INVERSE_TEMPERATURE = math.log(1 / 0.07)
MAX_LOG_INVERSE_TEMPERATURE = math.log(100.0)


class UniGDConfig(PreTrainedConfig):
    r"""
    Configuration of [`UniGDModel`] and [`UniGDForConditionalGeneration`]: the configuration of an image-text-to-text
    backbone, and the settings of the embedding head.

    Args:
        vlm_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the backbone, which can be any decoder-only model of `AutoModelForImageTextToText`.
            Defaults to the configuration of LLaVA-1.5-7B.
        head_type (`str`, *optional*, defaults to `"none"`):
            What turns a pooled hidden state into an embedding: `"none"` uses the hidden state itself (VladVA),
            `"linear"` applies one linear layer, and `"mlp"` applies a linear layer, GELU and a second linear layer
            (Sugar's retrieval projector).
        embedding_dim (`int`, *optional*):
            Size of the embeddings. Defaults to the hidden size of the backbone, the only size that `"none"` allows.
        head_hidden_dim (`int`, *optional*):
            Size of the `"mlp"` head's hidden layer. Defaults to the hidden size of the backbone.
        matryoshka_dims (`list[int]`, *optional*):
            Sizes of the prefixes that are trained to be embeddings themselves, each at most `embedding_dim`, which is
            always one of them.
        logit_scale_init_value (`float`, *optional*, defaults to `log(1 / 0.07)`):
            Initial value of `logit_scale`, the logarithm of the inverse temperature. The papers do not state theirs;
            the default is CLIP's.
        logit_scale_max_value (`float`, *optional*, defaults to `log(100)`):
            Upper limit of `logit_scale`. The default is CLIP's.
        checkpoint_format (`int`, *optional*, defaults to 1):
            Version of the checkpoint format. Older versions are read; newer versions raise an error.

    Raises:
        ValueError: if an argument is out of range, the backbone is not a decoder-only image-text-to-text model, or a
            newer version of hf-unigd saved the checkpoint.
    """

    model_type = "unigd"
    sub_configs = {"vlm_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        vlm_config=None,
        head_type="none",
        embedding_dim=None,
        head_hidden_dim=None,
        matryoshka_dims=None,
        logit_scale_init_value=LOG_INVERSE_TEMPERATURE,
        logit_scale_max_value=MAX_LOG_INVERSE_TEMPERATURE,
        checkpoint_format=CHECKPOINT_FORMAT,
        **kwargs,
    ):
        if not isinstance(checkpoint_format, int) or checkpoint_format > CHECKPOINT_FORMAT:
            raise ValueError(
                f"The checkpoint has format {checkpoint_format}, but this version of hf-unigd reads formats up to "
                f"{CHECKPOINT_FORMAT}. Upgrade it with `pip install -U hf-unigd`, or uninstall it and load the "
                "checkpoint with `trust_remote_code=True`."
            )
        if vlm_config is None:
            vlm_config = {"model_type": "llava"}
        if isinstance(vlm_config, dict):
            vlm_config = _backbone_config(vlm_config)
        if not isinstance(vlm_config, PreTrainedConfig) or isinstance(vlm_config, UniGDConfig):
            raise ValueError(
                "`vlm_config` must be the configuration of an image-text-to-text model, or a dict of its values, got "
                f"{type(vlm_config).__name__}."
            )
        hidden_size = _hidden_size(vlm_config)

        check_choice("head_type", head_type, HEAD_TYPES)
        if head_type == "none" and embedding_dim not in (None, hidden_size):
            raise ValueError(
                f"`embedding_dim={embedding_dim}` needs a head: without one, an embedding has the backbone's hidden "
                f"size of {hidden_size}. Set `head_type` to 'linear' or 'mlp', or leave `embedding_dim` out."
            )
        if head_type != "mlp" and head_hidden_dim is not None:
            raise ValueError(
                f"`head_hidden_dim={head_hidden_dim}` requires `head_type='mlp'`, but `head_type` is {head_type!r}."
            )
        for name, value in (("embedding_dim", embedding_dim), ("head_hidden_dim", head_hidden_dim)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")

        self.vlm_config = vlm_config
        self.head_type = head_type
        self.embedding_dim = hidden_size if embedding_dim is None else embedding_dim
        self.head_hidden_dim = head_hidden_dim
        # Without the full size, the other dimensions would get no gradient, and be used by default all the same.
        self.matryoshka_dims = sorted({*matryoshka_dims, self.embedding_dim}) if matryoshka_dims else None
        if self.matryoshka_dims and not 1 <= self.matryoshka_dims[0] <= self.matryoshka_dims[-1] <= self.embedding_dim:
            raise ValueError(
                f"`matryoshka_dims={matryoshka_dims}` must lie between 1 and `embedding_dim={self.embedding_dim}`."
            )
        self.logit_scale_init_value = logit_scale_init_value
        self.logit_scale_max_value = logit_scale_max_value
        self.checkpoint_format = CHECKPOINT_FORMAT  # the format that is saved, whichever format was loaded

        # The backbone ties its own embeddings. PEFT asks this config whether trained tokens are tied to the output.
        text_config = vlm_config.get_text_config(decoder=True)
        holder = vlm_config if hasattr(vlm_config, "tie_word_embeddings") else text_config
        kwargs["tie_word_embeddings"] = getattr(holder, "tie_word_embeddings", False)
        # The base class sets the attention implementation of sub-configs. This keeps the one that the backbone has.
        kwargs.setdefault("attn_implementation", {"": None, "vlm_config": attention_implementations(vlm_config)})
        super().__init__(**kwargs)
        # `register_for_auto_class` would only name the class that is saved, and the other class could not be loaded.
        self.auto_map = {
            "AutoConfig": "configuration_unigd.UniGDConfig",
            "AutoModel": "modeling_unigd.UniGDModel",
            "AutoModelForImageTextToText": "modeling_unigd.UniGDForConditionalGeneration",
            "AutoModelForMultimodalLM": "modeling_unigd.UniGDForConditionalGeneration",
            "AutoProcessor": "processing_unigd.UniGDProcessor",
        }

    # These three are properties so that they are not saved: `config.json` holds `vlm_config` alone.
    @property
    def text_config(self) -> PreTrainedConfig:
        """Configuration of the backbone's language model, as [`get_text_config`] returns it."""
        return self.get_text_config(decoder=True)

    @property
    def vision_config(self) -> PreTrainedConfig:
        """Configuration of the backbone's vision tower.

        Raises:
            AttributeError: if the configuration of the backbone has no `vision_config`.
        """
        if not hasattr(self.vlm_config, "vision_config"):
            raise AttributeError(
                f"The configuration of the backbone ({self.vlm_config.model_type!r}) has no `vision_config`."
            )
        return self.vlm_config.vision_config

    @property
    def context_length(self) -> int | None:
        """Maximum number of tokens that the backbone's language model takes, or `None` if its config names none."""
        return getattr(self.text_config, "max_position_embeddings", None)

    @property
    def custom_pipelines(self) -> dict:
        """The pipeline that `pipeline("feature-extraction", model=..., trust_remote_code=True)` uses.

        transformers' own pipeline would embed texts without their prompt. The dict is new each time, because
        `pipeline` replaces names in it by classes.
        """
        impl = "pipeline_unigd.UniGDFeatureExtractionPipeline"
        return {"feature-extraction": {"impl": impl, "pt": ["AutoModel"]}}

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        return self.vlm_config.get_text_config(decoder=decoder, encoder=encoder)


def _backbone_config(values: dict) -> PreTrainedConfig:
    """
    Raises:
        ValueError: `values` are not those of a backbone's configuration.
    """
    check_sizes("vlm_config", values)
    try:
        return AutoConfig.for_model(**values)
    except Exception as error:  # each family checks its values in its own way
        raise ValueError(
            f"`vlm_config` does not describe a model of the family {values.get('model_type')!r}: {error}"
        ) from error


def _hidden_size(vlm_config: PreTrainedConfig) -> int:
    """Width of the backbone's language model.

    Raises:
        ValueError: the backbone is not a decoder-only model of texts and images.
    """
    if getattr(vlm_config, "is_encoder_decoder", False):
        raise ValueError(
            f"`vlm_config` is the configuration of an encoder-decoder ({vlm_config.model_type!r}); the backbone must "
            "be a decoder-only model."
        )
    text_config = vlm_config.get_text_config(decoder=True)
    if getattr(text_config, "use_bidirectional_attention", None) in (True, "all"):
        raise ValueError(
            f"The language model of the backbone ({vlm_config.model_type!r}) attends to later tokens "
            "(`use_bidirectional_attention`), so what follows an embedding prompt would change the embedding. The "
            "backbone must be a decoder-only model."
        )
    hidden_size = getattr(text_config, "hidden_size", None)
    if not isinstance(hidden_size, int):
        raise ValueError(
            f"The configuration of the backbone ({vlm_config.model_type!r}) does not say which part of it is the "
            "language model, or how wide that is, so it cannot have an embedding head."
        )
    return hidden_size


def check_choice(name: str, value, choices: Iterable) -> None:
    """
    Raises:
        ValueError: if `value` is not one of `choices`. The message names the argument, `name`.
    """
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def attention_implementations(config) -> dict:
    """The attention implementations of a config and, nested by name, of its sub-configs."""
    nested = {name: getattr(config, name, None) for name in config.sub_configs}
    return {
        "": config._attn_implementation,
        **{
            name: attention_implementations(sub_config)
            for name, sub_config in nested.items()
            if sub_config is not None
        },
    }


UniGDConfig.register_for_auto_class()

__all__ = ["UniGDConfig"]

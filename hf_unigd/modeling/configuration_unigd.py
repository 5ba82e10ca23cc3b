"""Configuration of a vision-language model with an embedding head."""

import math

from transformers import AutoConfig, PreTrainedConfig


CHECKPOINT_FORMAT = 1
HEAD_TYPES = ("none", "linear", "mlp")
LOG_INVERSE_TEMPERATURE = math.log(1 / 0.07)
MAX_LOG_INVERSE_TEMPERATURE = math.log(100.0)


class UniGDConfig(PreTrainedConfig):
    r"""
    Configuration of [`UniGDModel`] and [`UniGDForConditionalGeneration`]: any image-text-to-text backbone plus an
    embedding head.

    Args:
        vlm_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the backbone, of any decoder-only model known to `AutoModelForImageTextToText`. Defaults
            to LLaVA-1.5-7B's.
        head_type (`str`, *optional*, defaults to `"none"`):
            What turns a pooled hidden state into an embedding: `"none"` (VladVA: the hidden state itself), `"linear"`,
            or `"mlp"` (Sugar's retrieval projector: linear, GELU, linear).
        embedding_dim (`int`, *optional*):
            Size of the embeddings. Defaults to the backbone's hidden size, which is the only choice for `"none"`.
        head_hidden_dim (`int`, *optional*):
            Inner size of the `"mlp"` head. Defaults to the backbone's hidden size.
        matryoshka_dims (`list[int]`, *optional*):
            Prefix sizes that were trained to be embeddings of their own, each at most `embedding_dim`.
        logit_scale_init_value (`float`, *optional*, defaults to `log(1 / 0.07)`):
            Initial logarithm of the inverse temperature (CLIP's; the papers leave it unsaid).
        logit_scale_max_value (`float`, *optional*, defaults to `log(100)`):
            Upper limit of the same logarithm (CLIP's).
        checkpoint_format (`int`, *optional*, defaults to 1):
            Version of what is saved. Older ones load, newer ones are refused.

    Raises:
        ValueError: an argument is out of range, the backbone is not a decoder-only image-text-to-text model, or the
            checkpoint was saved by a newer hf-unigd.
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
        if checkpoint_format > CHECKPOINT_FORMAT:
            raise ValueError(
                f"This checkpoint has format {checkpoint_format}, and this code knows formats up to "
                f"{CHECKPOINT_FORMAT}. Upgrade: `pip install -U hf-unigd`, or uninstall it and load with "
                "`trust_remote_code=True`."
            )
        if vlm_config is None:
            vlm_config = {"model_type": "llava"}
        if isinstance(vlm_config, dict):
            vlm_config = AutoConfig.for_model(**vlm_config)
        if vlm_config.is_encoder_decoder:
            raise ValueError(
                f"`vlm_config` is a {vlm_config.model_type!r} encoder-decoder; only causal decoders are supported."
            )
        text_config = vlm_config.get_text_config(decoder=True)
        for scaling in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(text_config, scaling, None) not in (None, 1, 1.0):
                raise ValueError(f"A backbone with `{scaling}` in its text config is not supported.")
        hidden_size = text_config.hidden_size

        if head_type not in HEAD_TYPES:
            raise ValueError(f"`head_type` must be one of {', '.join(HEAD_TYPES)}, got {head_type!r}.")
        if head_type == "none" and embedding_dim not in (None, hidden_size):
            raise ValueError(
                f"`embedding_dim={embedding_dim}` needs a head: without one the embedding has the backbone's hidden "
                f"size, {hidden_size}. Set `head_type` to 'linear' or 'mlp', or leave `embedding_dim` out."
            )
        if head_type != "mlp" and head_hidden_dim is not None:
            raise ValueError(f"`head_hidden_dim={head_hidden_dim}` is for `head_type='mlp'`, not {head_type!r}.")
        for name, value in (("embedding_dim", embedding_dim), ("head_hidden_dim", head_hidden_dim)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")

        self.vlm_config = vlm_config
        self.head_type = head_type
        self.embedding_dim = hidden_size if embedding_dim is None else embedding_dim
        self.head_hidden_dim = head_hidden_dim
        self.matryoshka_dims = sorted(matryoshka_dims) if matryoshka_dims else None
        if self.matryoshka_dims and not 1 <= self.matryoshka_dims[0] <= self.matryoshka_dims[-1] <= self.embedding_dim:
            raise ValueError(
                f"`matryoshka_dims={matryoshka_dims}` must lie between 1 and `embedding_dim={self.embedding_dim}`."
            )
        self.logit_scale_init_value = logit_scale_init_value
        self.logit_scale_max_value = logit_scale_max_value
        self.checkpoint_format = CHECKPOINT_FORMAT  # what it is saved as, whatever it was loaded from

        # The backbone ties its own; PEFT asks the wrapper whether trained tokens are tied to the output too.
        kwargs["tie_word_embeddings"] = vlm_config.tie_word_embeddings
        # The base class writes its attention implementation into sub-configs: keep what the backbone runs with.
        kwargs.setdefault("attn_implementation", {"": None, "vlm_config": _attention_implementations(vlm_config)})
        super().__init__(**kwargs)
        # Named in full: `register_for_auto_class` would write the saved class alone, and the other could not load.
        self.auto_map = {
            "AutoConfig": "configuration_unigd.UniGDConfig",
            "AutoModel": "modeling_unigd.UniGDModel",
            "AutoModelForImageTextToText": "modeling_unigd.UniGDForConditionalGeneration",
            "AutoProcessor": "processing_unigd.UniGDProcessor",
        }

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        return self.vlm_config.get_text_config(decoder=decoder, encoder=encoder)


def _attention_implementations(config) -> dict:
    """The attention implementation of a config and, by name, of its sub-configs."""
    nested = {name: getattr(config, name, None) for name in config.sub_configs}
    return {
        "": config._attn_implementation,
        **{
            name: _attention_implementations(sub_config)
            for name, sub_config in nested.items()
            if sub_config is not None
        },
    }


UniGDConfig.register_for_auto_class()

__all__ = ["UniGDConfig"]

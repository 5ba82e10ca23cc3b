"""A vision-language model that embeds and generates: a composed backbone and a small embedding head.

The backbone is a whole model of its own (`self.vlm`), not a base class: transformers skips its key renames for custom
code, so a subclass would load native checkpoints with a random `lm_head`.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageTextToText, Cache, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from .backbone_unigd import accepts_image_features, backbone_logits, check_backbone, image_features
from .checkpoint_unigd import UniGDCheckpointModel
from .configuration_unigd import UniGDConfig
from .head_unigd import UniGDHead, at_least_float32, last_token_spans, pool_spans
from .processing_unigd import UniGDProcessor


MAX_LOGITS = 1 << 26  # how many are in memory at once: 256 MB in float32


@dataclass
class UniGDModelOutput(ModelOutput):
    """
    Attributes:
        embeddings (`torch.FloatTensor` of shape `(num_spans, embedding_dim)`):
            L2-normalised float32 embeddings, one per span, in the order of `spans`; one per row if `spans` is not
            given.
        inverse_temperature (`torch.FloatTensor` of shape `()`):
            The contrastive loss multiplies similarities by it.
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
            Output of the decoder's last layer after its final norm.
        hidden_states, attentions:
            As the backbone returns them, if they are requested.
    """

    embeddings: torch.Tensor | None = None
    inverse_temperature: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class UniGDCausalLMOutput(ModelOutput):
    """
    Attributes:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` or `shift_labels` is given):
            Next-token cross-entropy over the labelled positions.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`, *optional*):
            Next-token scores, or `None` if they are skipped (see `skip_logits`).
        embeddings (`torch.FloatTensor` of shape `(num_spans, embedding_dim)`, *optional*):
            As in [`UniGDModelOutput`], or `None` while decoding from a cache without `spans`.
        inverse_temperature (`torch.FloatTensor` of shape `()`):
            The contrastive loss multiplies similarities by it.
        past_key_values, hidden_states, attentions:
            As the backbone returns them, if they are requested.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    inverse_temperature: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class UniGDPreTrainedModel(UniGDCheckpointModel):
    """What both classes share: the backbone, the head, embedding, loading and saving.

    Attributes:
        processor ([`UniGDProcessor`]): The model's processor, or None if it is not known. It is saved with the model.
        verify_saves (`bool`): Whether to load every checkpoint after saving it, to check that it embeds the same. It
            is loaded on the model's device.
    """

    config_class = UniGDConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _tied_weights_keys: dict[str, str] = {}  # noqa: RUF012  # PEFT and transformers collect the backbone's own
    _keep_in_fp32_modules_strict = {"embedding_head"}  # noqa: RUF012
    # The backbone, a `PreTrainedModel` of its own, checks whether it supports these.
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: UniGDConfig, vlm: PreTrainedModel | None = None):
        super().__init__(config)
        self.vlm = AutoModelForImageTextToText.from_config(config.vlm_config) if vlm is None else vlm
        check_backbone(self.vlm)
        config.vlm_config = self.vlm.config  # `from_config` copies it, but resizing must change the same config
        self.embedding_head = UniGDHead(config)
        self.processor: UniGDProcessor | None = None
        self.verify_saves = True
        self.add_model_tags(["hf-unigd", "embeddings", "retrieval", "sentence-transformers"])
        self.post_init()
        # CLIP names classes of its text model too, and FSDP refuses names of classes that the model does not have.
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    def _init_weights(self, module):
        # This is called for our own modules only: the backbone, a `PreTrainedModel`, initialises its own.
        super()._init_weights(module)
        if isinstance(module, UniGDHead):
            nn.init.constant_(module.logit_scale, self.config.logit_scale_init_value)

    def get_input_embeddings(self):
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.vlm.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.vlm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings):
        self.vlm.set_output_embeddings(new_embeddings)

    def clamp_logit_scale_(self) -> None:
        """Clamps the logarithm of the inverse temperature to `config.logit_scale_max_value`, in place. The trainer
        calls this after each optimizer step."""
        with torch.no_grad():
            self.embedding_head.logit_scale.clamp_(max=self.config.logit_scale_max_value)

    def add_soft_prompts(self, token_ids: list[int], source_ids: list[int]) -> None:
        """
        Makes room for reserved soft-prompt tokens and initialises each with the embedding of the token of the
        hand-written prompt that it replaces (VladVA, section 3.3).

        Args:
            token_ids (`list[int]`): Ids of the reserved tokens ([`UniGDProcessor.add_soft_prompts`] returns both).
            source_ids (`list[int]`): Ids of the tokens of the hand-written prompt, one for each reserved token.

        Raises:
            ValueError: the two lists differ in length.
        """
        if len(token_ids) != len(source_ids):
            raise ValueError(f"{len(token_ids)} soft-prompt tokens, but {len(source_ids)} tokens to initialise them.")
        if max(token_ids) >= self.get_input_embeddings().num_embeddings:
            # mean_resizing would compute the covariance of the whole table for rows that are overwritten below
            self.vlm.resize_token_embeddings(max(token_ids) + 1, mean_resizing=False)
        # A reserved token is never generated: its untied output row starts at zero, and generation suppresses it.
        tied = self.get_output_embeddings().weight is self.get_input_embeddings().weight
        size = self.get_input_embeddings().num_embeddings
        with torch.no_grad():
            # Some families look tokens up in tables of their layers too.
            for table in {self.get_input_embeddings(), *self.vlm.get_decoder().modules()}:
                if isinstance(table, nn.Embedding) and table.num_embeddings == size:
                    table.weight[token_ids] = table.weight[source_ids]
            if not tied:
                self.get_output_embeddings().weight[token_ids] = 0
        suppressed = set(self.vlm.generation_config.suppress_tokens or []) | set(token_ids)
        self.vlm.generation_config.suppress_tokens = sorted(suppressed)

    def embed(
        self, *, spans=None, attention_mask=None, truncate_dim=None, labels=None, shift_labels=None, **inputs
    ) -> torch.Tensor:
        """
        Computes embeddings only, without the language-modelling head.

        Args:
            spans (`torch.LongTensor` of shape `(num_spans, 3)`, *optional*): row, start and end (exclusive) of each
                span to embed. Defaults to the last attended token of each row.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*).
            truncate_dim (`int`, *optional*): Size of the Matryoshka prefix to keep and normalise again.
            labels, shift_labels: Ignored, so that a training batch can be passed unchanged.
            inputs: The other inputs of the backbone, as [`UniGDProcessor`] returns them.

        Returns:
            `torch.FloatTensor` of shape `(num_spans, embedding_dim)` or `(num_spans, truncate_dim)`: unit vectors.

        Raises:
            ValueError: if `truncate_dim` is neither one of `config.matryoshka_dims` nor the full size, or a row has
                more tokens than `config.context_length`.
        """
        self._check_length(attention_mask, **inputs)
        sizes = self.config.matryoshka_dims or [self.config.embedding_dim]
        if truncate_dim is not None and truncate_dim not in sizes:
            raise ValueError(
                f"`truncate_dim={truncate_dim}` was not trained. The model was trained for the sizes {sizes}. Choose "
                "one of them."
            )
        outputs = self._decode(attention_mask=attention_mask, use_cache=False, **inputs)
        embeddings = self._pool(outputs.last_hidden_state, attention_mask, spans)
        return embeddings if truncate_dim is None else F.normalize(embeddings[:, :truncate_dim], dim=-1)

    def embed_and_predict(self, *, spans, attention_mask=None, **inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Computes embeddings, and what the model would say where each span ends: for an embedding prompt, the next-token
        distribution at the summary token (VladVA, section 3.4).

        Args:
            spans (`torch.LongTensor` of shape `(num_spans, 3)`): row, start and end (exclusive) of each span.
            attention_mask, inputs: As in [`embed`].

        Returns:
            The embeddings, a `torch.FloatTensor` of shape `(num_spans, embedding_dim)`, and the next-token scores, of
            shape `(num_spans, vocab_size)`.

        Raises:
            ValueError: if a row has more tokens than `config.context_length`.
        """
        self._check_length(attention_mask, **inputs)
        hidden_states = self._decode(attention_mask=attention_mask, use_cache=False, **inputs).last_hidden_state
        rows, _, ends = spans.to(hidden_states.device).unbind(1)
        return self._pool(hidden_states, attention_mask, spans), self.logits(hidden_states[rows, ends - 1])

    def _check_length(self, attention_mask=None, input_ids=None, **inputs) -> None:
        limit = self.config.context_length
        if limit is None or input_ids is None or input_ids.shape[1] <= limit:
            return
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        longest, row = mask.sum(1).max(0)
        if longest > limit:
            raise ValueError(
                f"Row {row.item()} has {longest.item()} tokens, more than the {limit} of the model's context. "
                "Shorten it."
            )

    @property
    def accepts_image_features(self) -> bool:
        """Whether the backbone takes the output of its vision tower instead of pixels."""
        return accepts_image_features(self.vlm)

    def image_features(self, **inputs) -> ModelOutput:
        """
        Runs the vision tower and its projector.

        Args:
            inputs: A batch as [`UniGDProcessor`] returns it, with images.

        Returns:
            The backbone's own output, whole, because families differ in what their language model reads of it.
            `forward` and `embed` accept it as `image_features` instead of `pixel_values`.
        """
        return image_features(self.vlm, inputs)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Computes next-token scores as the backbone does, with the scaling or capping that its family applies.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., hidden_size)`): From the decoder's last layer, after its
                final norm.

        Returns:
            `torch.FloatTensor` of shape `(..., vocab_size)`.
        """
        batch = hidden_states.reshape(1, -1, hidden_states.shape[-1]) if hidden_states.ndim < 3 else hidden_states
        logits = backbone_logits(self.vlm, batch)
        return logits.reshape(*hidden_states.shape[:-1], logits.shape[-1])

    def _decode(self, image_features=None, **inputs):
        """Runs the backbone without its language-modelling head. Inputs that are None are not passed on."""
        _refuse_videos(inputs)
        if image_features is not None:
            inputs["mm_encoder_outputs"] = {"image": image_features}
        return self.vlm.base_model(**{name: value for name, value in inputs.items() if value is not None})

    def _pool(self, last_hidden_state, attention_mask, spans) -> torch.Tensor:
        if spans is None:
            if attention_mask is None:
                attention_mask = torch.ones(last_hidden_state.shape[:2], device=last_hidden_state.device)
            spans = last_token_spans(attention_mask)
        return self.embedding_head(pool_spans(last_hidden_state, spans))


class UniGDModel(UniGDPreTrainedModel):
    """Embeds sequences of text and images.

    It keeps the backbone's language-modelling head and generation config, so that what it saves also loads as
    [`UniGDForConditionalGeneration`].
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        spans: torch.Tensor | None = None,
        **kwargs,
    ) -> UniGDModelOutput:
        r"""
        Args:
            spans (`torch.LongTensor` of shape `(num_spans, 3)`, *optional*): row, start and end (exclusive) of each
                span to embed. Defaults to the last attended token of each row.
            kwargs: All other inputs are passed to the backbone.
        """
        kwargs.setdefault("use_cache", False)
        outputs = self._decode(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, **kwargs)
        return UniGDModelOutput(
            embeddings=self._pool(outputs.last_hidden_state, attention_mask, spans),
            inverse_temperature=self.embedding_head.inverse_temperature,
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class UniGDForConditionalGeneration(UniGDPreTrainedModel, GenerationMixin):
    """Embeds and generates. Logits and generation are the backbone's own."""

    # One object for both, so that what is set on either is used by `generate` and saved.
    @property
    def generation_config(self):
        return self.vlm.generation_config

    @generation_config.setter
    def generation_config(self, value):
        if "vlm" in self._modules:  # `PreTrainedModel.__init__` sets a default before the backbone exists
            self.vlm.generation_config = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        spans: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        batches: list[dict] | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> UniGDCausalLMOutput:
        r"""
        Args:
            spans (`torch.LongTensor` of shape `(num_spans, 3)`, *optional*): row, start and end (exclusive) of each
                span to embed. Defaults to the last attended token of each row.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Targets of the next-token
                loss, with -100 where there is none. The language-modelling head for the loss only runs at labelled
                positions.
            shift_labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Targets that are
                already shifted: `shift_labels[:, i]` is the target of position `i`. They take precedence over
                `labels`, as in transformers.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): As in the backbone.
            skip_logits (`bool`, *optional*): Return no `logits`. Defaults to `True` in training with labels.
            batches (`list[dict]`, *optional*): Several batches of all these inputs instead of one. Their embeddings
                are concatenated, their losses are added, and no logits are returned. They share one call because DDP
                expects one forward per step.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): Divisor of the summed loss. Defaults to the
                number of labelled positions.
            label_smoothing (`float`, *optional*, defaults to 0.0): Share of each target's probability that the loss
                spreads over the whole vocabulary.
            kwargs: All other inputs are passed to the backbone. `image_features` can replace the images.
        """
        # If they were named parameters, Trainer would take them for labels and expect them in every batch.
        label_smoothing, shift_labels = kwargs.pop("label_smoothing", 0.0), kwargs.pop("shift_labels", None)
        if batches is not None:
            return self._forward_all(batches, num_items_in_batch, label_smoothing)
        targets = _targets(labels, shift_labels)
        outputs = self._decode(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, **kwargs)
        hidden_states = outputs.last_hidden_state

        loss = None
        if targets is not None:
            loss = self._next_token_loss(hidden_states, targets, num_items_in_batch, label_smoothing)
        if skip_logits is None:
            skip_logits = self.training and targets is not None
        logits = None
        if not skip_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.logits(hidden_states[:, kept])

        embeddings = None
        is_cached_step = attention_mask is not None and attention_mask.shape[1] != hidden_states.shape[1]
        if spans is not None or not is_cached_step:
            embeddings = self._pool(hidden_states, attention_mask, spans)

        return UniGDCausalLMOutput(
            loss=loss,
            logits=logits,
            embeddings=embeddings,
            inverse_temperature=self.embedding_head.inverse_temperature,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _forward_all(self, batches, num_items_in_batch, label_smoothing) -> UniGDCausalLMOutput:
        all_targets = [_targets(batch.get("labels"), batch.get("shift_labels")) for batch in batches]
        if num_items_in_batch is None:
            num_items_in_batch = max(1, sum(int(each.ne(-100).sum()) for each in all_targets if each is not None))
        losses, embeddings = [], []
        # This does not call `forward`, because accelerate wraps that in an autocast that cannot be entered twice.
        for batch, targets in zip(batches, all_targets, strict=True):
            inputs = {name: value for name, value in batch.items() if name not in ("labels", "shift_labels", "spans")}
            hidden_states = self._decode(use_cache=False, **inputs).last_hidden_state
            losses.append(self._next_token_loss(hidden_states, targets, num_items_in_batch, label_smoothing))
            embeddings.append(self._pool(hidden_states, batch.get("attention_mask"), batch.get("spans")))
        return UniGDCausalLMOutput(
            loss=torch.stack(losses).sum(),
            embeddings=torch.cat(embeddings),
            inverse_temperature=self.embedding_head.inverse_temperature,
        )

    def _next_token_loss(self, hidden_states, targets, num_items_in_batch, label_smoothing):
        vocab_size = self.config.get_text_config().vocab_size
        return next_token_loss(hidden_states, targets, self.logits, vocab_size, num_items_in_batch, label_smoothing)

    def generate(self, inputs=None, generation_config=None, **kwargs):
        """Generates as the backbone does. `spans` is ignored, so that a batch can be passed unchanged."""
        kwargs.pop("spans", None)
        _refuse_videos(kwargs)
        return self.vlm.generate(inputs, generation_config=generation_config, **kwargs)


def _refuse_videos(inputs: dict) -> None:
    videos = [name for name, value in inputs.items() if "video" in name and value is not None]
    if videos:
        raise ValueError(f"Videos are not supported, but the inputs hold `{videos[0]}`. Pass images and texts.")


def next_token_loss(
    hidden_states, targets, lm_head, vocab_size, num_items_in_batch=None, label_smoothing=0.0
) -> torch.Tensor:
    """Cross-entropy of the labelled tokens, each predicted from the position before it (VladVA, section 3.2).

    More than `MAX_LOGITS` logits are never in memory at once: they are computed in slices, and again in the backward
    pass.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`).
        targets (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The token that follows each position;
            -100 where there is no target.
        lm_head (`Callable`): Maps hidden states `(n, hidden_size)` to logits `(n, vocab_size)`. It only runs at
            labelled positions.
        vocab_size (`int`): Number of logits of a position.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): Divisor of the summed cross-entropy: in training, the
            number of labelled tokens of all processes and accumulation steps. Defaults to the number in this batch.
        label_smoothing (`float`, *optional*, defaults to 0.0): As in `torch.nn.functional.cross_entropy`.

    Returns:
        `torch.FloatTensor` of shape `()`: 0 if nothing is labelled.
    """
    targets = targets.to(hidden_states.device)
    labelled = targets != -100
    hidden_states, targets = hidden_states[labelled], targets[labelled]
    rows = max(1, MAX_LOGITS // vocab_size)
    if len(targets) <= rows:
        total = _summed_cross_entropy(hidden_states, targets, lm_head, label_smoothing)
    else:
        slices = zip(hidden_states.split(rows), targets.split(rows), strict=True)
        total = torch.stack(
            [
                checkpoint(_summed_cross_entropy, *part, lm_head, label_smoothing, use_reentrant=False)
                for part in slices
            ]
        ).sum()
    return total / (labelled.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def _targets(labels: torch.Tensor | None, shift_labels: torch.Tensor | None) -> torch.Tensor | None:
    """The target of each position: `shift_labels` as they are, or else `labels` moved back by one position."""
    if shift_labels is not None or labels is None:
        return shift_labels
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def _summed_cross_entropy(hidden_states, targets, lm_head, label_smoothing):
    logits = at_least_float32(lm_head(hidden_states))
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)


UniGDModel.register_for_auto_class("AutoModel")
UniGDForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["UniGDForConditionalGeneration", "UniGDModel", "UniGDPreTrainedModel"]

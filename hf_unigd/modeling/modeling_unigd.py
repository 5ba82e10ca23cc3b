"""A vision-language model that embeds and generates: a composed backbone and a small embedding head.

The backbone is held whole (`self.vlm`), never subclassed: transformers skips its key renames for custom code, so that
a subclass would load native checkpoints with a random `lm_head`.
"""

import inspect
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageTextToText, Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from .adapter_unigd import is_adapter, load_base_model
from .configuration_unigd import UniGDConfig
from .hub_files_unigd import commit_of, find_file, hub_arguments, inherited_trust
from .probe_unigd import PROBE_NAME, load_probe, probe_difference, probe_tolerance, save_probe
from .processing_unigd import UniGDProcessor


logger = logging.getLogger(__name__)

MAX_LOGITS = 1 << 26  # at once, 256 MB in float32


@dataclass
class UniGDModelOutput(ModelOutput):
    r"""
    embeddings (`torch.FloatTensor` of shape `(num_spans, embedding_dim)`):
        L2-normalised float32 embeddings, one a span, in the order of `spans` (one a row where `spans` was not given).
    inverse_temperature (`torch.FloatTensor` of shape `()`):
        Inverse temperature by which similarities are multiplied in the contrastive loss.
    last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
        Output of the decoder's last layer after its final norm.
    hidden_states, attentions:
        As the backbone returns them, when asked for.
    """

    embeddings: torch.Tensor | None = None
    inverse_temperature: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class UniGDCausalLMOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` is given):
        Next-token cross-entropy over the labelled positions.
    logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`, *optional*):
        Next-token scores; `None` where they were skipped (see `skip_logits`).
    embeddings (`torch.FloatTensor` of shape `(num_spans, embedding_dim)`, *optional*):
        As in [`UniGDModelOutput`]; `None` while decoding from a cache without `spans`.
    inverse_temperature (`torch.FloatTensor` of shape `()`):
        Inverse temperature of the contrastive loss.
    past_key_values, hidden_states, attentions:
        As the backbone returns them, when asked for.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    inverse_temperature: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class Float32Linear(nn.Linear):
    """Computed in float32 or better, whatever its weights are held in."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = _at_least_float32(self.weight), _at_least_float32(self.bias)
        return F.linear(input.to(weight.dtype), weight, bias)


class UniGDHead(nn.Module):
    """Turns pooled hidden states `(n, hidden_size)` into embeddings `(n, embedding_dim)`, and owns the temperature.

    Held in float32 whatever the backbone is, and computed in float32 or better also where it is cast: by autocast, by
    FSDP or DeepSpeed in bfloat16, by hand. The temperature lives here so that a PEFT adapter that saves the head
    (`modules_to_save`) has all that embedding needs.
    """

    def __init__(self, config: UniGDConfig):
        super().__init__()
        hidden_size = config.get_text_config().hidden_size
        if config.head_type == "none":
            self.projection: nn.Module = nn.Identity()
        elif config.head_type == "linear":
            self.projection = Float32Linear(hidden_size, config.embedding_dim)
        else:
            inner_size = config.head_hidden_dim or hidden_size
            self.projection = nn.Sequential(
                Float32Linear(hidden_size, inner_size), nn.GELU(), Float32Linear(inner_size, config.embedding_dim)
            )
        # Of shape (1,): FSDP shards no scalars.
        self.logit_scale = nn.Parameter(torch.tensor([float(config.logit_scale_init_value)]))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # As in `_WithOneDimension`: adapters are loaded by torch.
        if (temperature := state_dict.get(f"{prefix}logit_scale")) is not None:
            state_dict[f"{prefix}logit_scale"] = temperature.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device_type=pooled.device.type, enabled=False):
            return F.normalize(self.projection(_at_least_float32(pooled)), dim=-1)

    @property
    def inverse_temperature(self) -> torch.Tensor:
        """By which similarities are multiplied, of shape `()`."""
        return _at_least_float32(self.logit_scale).exp().squeeze()


def last_token_spans(attention_mask: torch.Tensor) -> torch.Tensor:
    """Spans `(batch_size, 3)` of the last attended token of each row, whichever side is padded.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 1 for tokens, 0 for padding.
    """
    length = attention_mask.shape[1]
    last = length - 1 - attention_mask.flip(1).to(torch.int32).argmax(1)
    rows = torch.arange(attention_mask.shape[0], device=attention_mask.device)
    return torch.stack([rows, last, last + 1], dim=1)


def pool_spans(hidden_states: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
    """Mean hidden state of each span, summed in float32 or better.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`).
        spans (`torch.LongTensor` of shape `(num_spans, 3)`): row, start and end (exclusive) of each span.

    Returns:
        `torch.FloatTensor` of shape `(num_spans, hidden_size)`.
    """
    if len(spans) == 0:  # `segment_reduce` refuses it; a slice, so that a gradient (of zero) flows all the same
        return _at_least_float32(hidden_states.flatten(0, 1)[:0])
    rows, starts, ends = spans.to(hidden_states.device).unbind(1)
    lengths = ends - starts
    # Flat index of every pooled token: segment starts repeated, plus the place inside the segment.
    segment = torch.repeat_interleave(lengths)
    place = torch.arange(segment.shape[0], device=segment.device) - (lengths.cumsum(0) - lengths)[segment]
    tokens = hidden_states.flatten(0, 1)[(rows * hidden_states.shape[1] + starts)[segment] + place]
    return torch.segment_reduce(_at_least_float32(tokens), "mean", lengths=lengths)


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class UniGDPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by both classes.

    Attributes:
        processor ([`UniGDProcessor`]): The model's processor, where it is known; saved with the model.
        verify_saves (`bool`): Open every checkpoint again after saving it, to see that it embeds the same.
    """

    config_class = UniGDConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _tied_weights_keys: dict[str, str] = {}  # noqa: RUF012  # none but the backbone's, which PEFT and transformers collect from it
    _keep_in_fp32_modules_strict = {"embedding_head"}  # noqa: RUF012
    # Whether the backbone has these is checked by the backbone itself, a `PreTrainedModel` of its own.
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: UniGDConfig, vlm: PreTrainedModel | None = None):
        super().__init__(config)
        self.vlm = AutoModelForImageTextToText.from_config(config.vlm_config) if vlm is None else vlm
        config.vlm_config = self.vlm.config  # `from_config` works on a copy; resizing must change one config
        self.embedding_head = UniGDHead(config)
        self.processor: UniGDProcessor | None = None
        self.verify_saves = True
        self.add_model_tags(["hf-unigd", "embeddings", "retrieval", "sentence-transformers"])
        self.post_init()
        # CLIP names its text side's too, and FSDP refuses to shard by a class that is not there.
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    def _init_weights(self, module):
        # Called for our own modules alone: the backbone, a `PreTrainedModel`, initialises its own.
        super()._init_weights(module)
        if isinstance(module, UniGDHead):
            nn.init.constant_(module.logit_scale, self.config.logit_scale_init_value)

    @classmethod
    def from_vlm(cls, vlm: PreTrainedModel, **config_kwargs):
        """
        Adds a new embedding head to a vision-language model in memory. Parameters are shared, not copied.

        Args:
            vlm (`PreTrainedModel`): An image-text-to-text model with its language-modelling head.
            config_kwargs: Arguments of [`UniGDConfig`] other than `vlm_config`.

        Raises:
            ValueError: `vlm` has no language-modelling head, or an argument of the config is out of range.
        """
        if vlm.get_output_embeddings() is None:
            raise ValueError(
                f"{type(vlm).__name__} has no language-modelling head. Pass the class that generates, as "
                "`AutoModelForImageTextToText` loads it."
            )
        config = UniGDConfig(vlm_config=vlm.config, dtype=vlm.dtype, name_or_path=vlm.name_or_path, **config_kwargs)
        model = cls(config, vlm=vlm)
        model.embedding_head.to(vlm.get_output_embeddings().weight.device)
        # A quantised or dispatched backbone: Trainer, PEFT and accelerate look for these on the outer model.
        for name in ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"):
            if hasattr(vlm, name):
                setattr(model, name, getattr(vlm, name))
        if hasattr(vlm, "hf_device_map"):
            model.hf_device_map = {f"vlm.{name}".rstrip("."): device for name, device in vlm.hf_device_map.items()}
        return model.eval()

    @classmethod
    def from_vlm_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """
        Loads a plain vision-language model and adds a new embedding head to it. The head is the only thing that is
        new; every tensor of the backbone must come from the checkpoint.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A Hub id or folder of any decoder-only
                image-text-to-text model, for example `"llava-hf/llava-1.5-7b-hf"`.
            kwargs: Arguments of [`UniGDConfig`] (`head_type`, `embedding_dim`, ...); the rest goes to
                `AutoModelForImageTextToText.from_pretrained` (`dtype`, `attn_implementation`, `device_map`,
                `quantization_config`, `revision`, ...).

        Raises:
            RuntimeError: a tensor of the backbone is missing from the checkpoint, named in the message.
        """
        config_names = inspect.signature(UniGDConfig.__init__).parameters.keys() - {"self", "vlm_config", "kwargs"}
        config_kwargs = {name: kwargs.pop(name) for name in config_names & kwargs.keys()}
        vlm, info = AutoModelForImageTextToText.from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **kwargs
        )
        _raise_if_random(pretrained_model_name_or_path, info)
        vlm.config._commit_hash = commit_of(pretrained_model_name_or_path, kwargs)
        return cls.from_vlm(vlm, **config_kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, check_probe=True, **kwargs
    ):
        """
        As [`~PreTrainedModel.from_pretrained`], but never with a random weight, and never with one that embeds
        otherwise than what was saved.

        An adapter is put on the model that it names, and not merged into it (that needs `peft`).

        Args:
            check_probe (`bool`, *optional*, defaults to `True`): Embed the checkpoint's probe and compare. Quantised,
                offloaded and sharded models cannot be compared and are not.

        Raises:
            ValueError: the checkpoint is a plain vision-language model; use [`from_vlm_pretrained`]. Or it was saved
                by a newer hf-unigd.
            RuntimeError: a tensor is missing from the checkpoint or has another shape, named in the message, or the
                probe's embedding does not come out again.
        """
        # The Auto classes name the model beneath an adapter from the Hub, and the adapter in these.
        adapter_kwargs = kwargs.pop("adapter_kwargs", None) or {}
        adapter = adapter_kwargs.pop("_adapter_model_path", pretrained_model_name_or_path)
        if is_adapter(adapter, {**kwargs, **adapter_kwargs}):
            for name in ("config", "_from_auto"):
                kwargs.pop(name, None)
            model, info = cls._from_adapter(adapter, check_probe, {**kwargs, **adapter_kwargs})
            return (model, info) if output_loading_info else model
        hub_kwargs = hub_arguments(kwargs)
        if kwargs.get("config") is None:
            config_dict, _ = UniGDConfig.get_config_dict(pretrained_model_name_or_path, **hub_kwargs)
            if config_dict.get("model_type") != UniGDConfig.model_type:
                raise ValueError(
                    f"{pretrained_model_name_or_path} is a {config_dict.get('model_type')!r} checkpoint without an "
                    f"embedding head. `{cls.__name__}.from_vlm_pretrained(...)` adds a new one to it."
                )
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        _raise_if_random(pretrained_model_name_or_path, info)
        model.config._commit_hash = commit_of(pretrained_model_name_or_path, kwargs)
        if not model.can_generate():  # transformers reads it for those alone that can
            # A checkpoint without the file leaves the backbone's own defaults.
            with suppress(OSError):
                model.vlm.generation_config = GenerationConfig.from_pretrained(
                    pretrained_model_name_or_path, **hub_kwargs
                )
        if check_probe:
            model._check_probe(pretrained_model_name_or_path, kwargs)
        return (model, info) if output_loading_info else model

    @classmethod
    def _from_adapter(cls, name, check_probe: bool, kwargs: dict):
        where = hub_arguments(kwargs)
        processor = UniGDProcessor.from_pretrained(name, check_probe=check_probe, **where, **inherited_trust())
        model = load_base_model(cls, name, processor, check_probe=check_probe, **kwargs)
        info = model.load_adapter(name, adapter_kwargs=where).to_dict()
        if model.config.tie_word_embeddings:  # the output's soft prompts are the input's, under a second name
            info["missing_keys"] = {key for key in info["missing_keys"] if "lm_head.token_adapter" not in key}
        _raise_if_random(name, info)
        if check_probe:
            model._check_probe(name, where)
        return model, info

    def _check_probe(self, name, kwargs) -> None:
        probe_file = find_file(name, PROBE_NAME, kwargs)
        if probe_file is None or not self._can_be_probed:
            return
        probe = load_probe(probe_file)
        difference, tolerance = probe_difference(self, probe), probe_tolerance(self, probe)
        if difference > tolerance:
            raise RuntimeError(
                f"{name} does not compute what it did when it was saved: its probe is off by "
                f"{difference:.2g}, and rounding explains {tolerance:g}. A weight has changed, or a "
                "library computes otherwise. "
                "`check_probe=False` loads it all the same; `hf-unigd doctor` says more."
            )

    @property
    def _can_be_probed(self) -> bool:
        """Whether the weights are here, whole, and those that were saved."""
        devices = {parameter.device.type for parameter in self.parameters()}
        return not (
            "meta" in devices
            or is_deepspeed_zero3_enabled()
            or is_fsdp_managed_module(self)
            or getattr(self, "hf_quantizer", None) is not None
        )

    def save_pretrained(self, save_directory, *args, state_dict=None, push_to_hub=False, **kwargs):
        """
        As [`~PreTrainedModel.save_pretrained`]; with the model's `processor`, or else the one that it was loaded with,
        come the probe and what sentence-transformers needs. What was written is opened again and compared, unless
        `verify_saves` is off. With `push_to_hub`, all that [`~PreTrainedModel.push_to_hub`] takes is taken too.

        Raises:
            RuntimeError: what was written does not give the same embeddings.
        """
        with _own_class(self):
            super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
        if kwargs.get("is_main_process", True):
            # A state dict is given where the weights are spread over processes: there is nothing here to embed with.
            self._save_companions(Path(save_directory), has_weights=state_dict is None)
        if push_to_hub:
            taken = inspect.signature(self.push_to_hub).parameters
            hub_kwargs = {name: value for name, value in kwargs.items() if name in taken}
            self.push_to_hub(**{"repo_id": Path(save_directory).name, **hub_kwargs})

    def _save_companions(self, folder: Path, has_weights: bool = True, can_be_opened: bool = True) -> None:
        (folder / PROBE_NAME).unlink(missing_ok=True)  # another model's
        processor = self.processor or self._processor_of_checkpoint()
        if processor is None:
            logger.warning(
                "Saved %s without processor, probe and sentence-transformers' modules. Set `model.processor` to the "
                "model's UniGDProcessor to save them too.",
                folder,
            )
            return
        processor.save_pretrained(folder)
        self._save_sentence_transformer(folder)
        if not (has_weights and self._can_be_probed):
            logger.warning(
                "Saved %s without a probe: the weights are sharded, offloaded or quantised. `load_checkpoint(...)[0]"
                ".save_pretrained(...)` adds one.",
                folder,
            )
            return
        save_probe(self, processor, folder)
        if self.verify_saves and can_be_opened:
            type(self).from_pretrained(folder, dtype=self.dtype)

    def _processor_of_checkpoint(self) -> UniGDProcessor | None:
        """The processor beside the weights that this model was loaded from."""
        if not self.name_or_path:
            return None
        with suppress(OSError, ValueError):  # a plain model's, or none
            return UniGDProcessor.from_pretrained(self.name_or_path, **self._hub_revision, **inherited_trust())
        return None

    @property
    def _hub_revision(self) -> dict[str, str]:
        """The commit that this model was loaded from, where it came from the Hub."""
        commit = getattr(self.config, "_commit_hash", None)
        return {"revision": commit} if commit else {}

    def _save_sentence_transformer(self, folder: Path) -> None:
        code = Path(__file__).with_name("sentence_unigd.py")
        if not code.is_file():  # loaded as remote code, of which transformers fetches only what it runs
            found = find_file(self.name_or_path, code.name, self._hub_revision)
            if found is None:
                return
            code = Path(found)
        if code.resolve() != (folder / code.name).resolve():
            shutil.copyfile(code, folder / code.name)
        module = {"idx": 0, "name": "0", "path": "", "type": "sentence_unigd.UniGDSentenceModule"}
        settings: dict[str, object] = {"similarity_fn_name": "cosine", "prompts": {}, "default_prompt_name": None}
        # From which MTEB learns that pictures are taken.
        forward = {"method": "forward", "method_output_name": "embeddings"}
        modalities = {"modality_config": dict.fromkeys(("text", "image", "message"), forward)}
        for name, content in (
            ("modules.json", [module]),
            ("config_sentence_transformers.json", settings),
            ("sentence_bert_config.json", modalities),
        ):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def get_input_embeddings(self):
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.vlm.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.vlm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings):
        self.vlm.set_output_embeddings(new_embeddings)

    def clamp_logit_scale_(self) -> None:
        """Limits the temperature to `config.logit_scale_max_value`, in place; called after each optimizer step."""
        with torch.no_grad():
            self.embedding_head.logit_scale.clamp_(max=self.config.logit_scale_max_value)

    def add_soft_prompts(self, token_ids: list[int], source_ids: list[int]) -> None:
        """
        Makes room for reserved soft-prompt tokens and initialises each with the embedding of the hand-written prompt's
        token that it replaces (VladVA, section 3.3).

        Args:
            token_ids (`list[int]`): Ids of the reserved tokens ([`UniGDProcessor.add_soft_prompts`] returns both).
            source_ids (`list[int]`): Ids of the hand-written prompt's tokens, one for each.

        Raises:
            ValueError: the two lists differ in length.
        """
        if len(token_ids) != len(source_ids):
            raise ValueError(f"{len(token_ids)} soft-prompt tokens, but {len(source_ids)} tokens to initialise them.")
        if max(token_ids) >= self.get_input_embeddings().num_embeddings:
            # mean_resizing would compute a covariance of the whole table for rows that are overwritten just below
            self.vlm.resize_token_embeddings(max(token_ids) + 1, mean_resizing=False)
        # A reserved token is read, never written: untied output rows start at zero, and generation leaves them out.
        tied = self.get_output_embeddings().weight is self.get_input_embeddings().weight
        with torch.no_grad():
            self.get_input_embeddings().weight[token_ids] = self.get_input_embeddings().weight[source_ids]
            if not tied:
                self.get_output_embeddings().weight[token_ids] = 0
        suppressed = set(self.vlm.generation_config.suppress_tokens or []) | set(token_ids)
        self.vlm.generation_config.suppress_tokens = sorted(suppressed)

    def embed(self, *, spans=None, attention_mask=None, truncate_dim=None, labels=None, **inputs) -> torch.Tensor:
        """
        Embeddings alone; the language-modelling head is left out.

        Args:
            spans (`torch.LongTensor` of shape `(num_spans, 3)`, *optional*): row, start and end (exclusive) of each
                span to embed. Defaults to the last attended token of each row.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*).
            truncate_dim (`int`, *optional*): Keep this Matryoshka prefix, normalised again.
            labels: Ignored, so that a training batch can be passed as it is.
            inputs: Every other input of the backbone, as [`UniGDProcessor`] returns them.

        Returns:
            `torch.FloatTensor` of shape `(num_spans, embedding_dim)` or `(num_spans, truncate_dim)`: unit vectors.

        Raises:
            ValueError: `truncate_dim` is not among `config.matryoshka_dims`.
        """
        if truncate_dim is not None and truncate_dim not in (self.config.matryoshka_dims or []):
            trained = self.config.matryoshka_dims
            raise ValueError(f"`truncate_dim={truncate_dim}` was not trained for, only `matryoshka_dims={trained}`.")
        outputs = self._decode(attention_mask=attention_mask, use_cache=False, **inputs)
        embeddings = self._pool(outputs.last_hidden_state, attention_mask, spans)
        return embeddings if truncate_dim is None else F.normalize(embeddings[:, :truncate_dim], dim=-1)

    def image_features(self, **inputs) -> tuple[torch.Tensor, ...]:
        """
        What the language model receives in place of each image: the vision tower and its projector alone.

        Args:
            inputs: A batch as [`UniGDProcessor`] returns it, with images.

        Returns:
            `tuple` of `torch.FloatTensor` of shape `(num_image_tokens, hidden_size)`, one an image, in their order;
            `forward` and `embed` take it as `image_features` instead of `pixel_values`.
        """
        encode = self.vlm.base_model.get_image_features
        names = inspect.signature(encode).parameters.keys() & inputs.keys()
        outputs = encode(**{name: inputs[name] for name in names}, return_dict=True)
        return tuple(outputs.pooler_output)

    def _decode(self, image_features=None, **inputs):
        """The backbone without its language-modelling head; inputs that were not given are left out."""
        if image_features is not None:
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=list(image_features))}
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
            kwargs: Every other input goes to the backbone as it is.
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

    def save_pretrained(self, save_directory, *args, **kwargs):
        super().save_pretrained(save_directory, *args, **kwargs)
        self.vlm.generation_config.save_pretrained(save_directory)


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
                loss, -100 where there is none. Only labelled positions meet the language-modelling head.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): As in the backbone.
            skip_logits (`bool`, *optional*): Leave `logits` out. Defaults to `True` in training with `labels`.
            batches (`list[dict]`, *optional*): Several batches of all these inputs instead of one. Their embeddings
                are one tensor, their losses are added, and there are no logits. In one call, as DDP counts on one
                forward a step.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): The loss is the sum over labelled positions
                divided by this; by their number where it is not given.
            kwargs: Every other input goes to the backbone as it is; `image_features` may stand for the images.
        """
        if batches is not None:
            return self._forward_all(batches, num_items_in_batch)
        outputs = self._decode(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, **kwargs)
        hidden_states = outputs.last_hidden_state
        lm_head = self.get_output_embeddings()

        loss = None
        if labels is not None:
            loss = next_token_loss(hidden_states, labels, lm_head, num_items_in_batch)
        if skip_logits is None:
            skip_logits = self.training and labels is not None
        logits = None
        if not skip_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = lm_head(hidden_states[:, kept])

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

    def _forward_all(self, batches, num_items_in_batch) -> UniGDCausalLMOutput:
        if num_items_in_batch is None:
            num_items_in_batch = max(1, sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches))
        losses, embeddings = [], []
        # Not by `forward`: accelerate wraps it in an autocast that does not survive being entered twice.
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name not in ("labels", "spans")}
            hidden_states = self._decode(use_cache=False, **inputs).last_hidden_state
            lm_head = self.get_output_embeddings()
            losses.append(next_token_loss(hidden_states, batch["labels"], lm_head, num_items_in_batch))
            embeddings.append(self._pool(hidden_states, batch.get("attention_mask"), batch.get("spans")))
        return UniGDCausalLMOutput(
            loss=torch.stack(losses).sum(),
            embeddings=torch.cat(embeddings),
            inverse_temperature=self.embedding_head.inverse_temperature,
        )

    def generate(self, inputs=None, generation_config=None, **kwargs):
        """As [`~GenerationMixin.generate`], by the backbone. `spans` is ignored: a batch can be passed as it is."""
        kwargs.pop("spans", None)
        return self.vlm.generate(inputs, generation_config=generation_config, **kwargs)


def next_token_loss(hidden_states, labels, lm_head, num_items_in_batch=None) -> torch.Tensor:
    """Cross-entropy of the labelled tokens, each predicted from the position before it (VladVA, section 3.2).

    Logits of a large vocabulary never stand in memory whole: beyond `MAX_LOGITS` they are computed in slices, and
    again in the backward pass.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`).
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): -100 where there is no target.
        lm_head (`nn.Module`): Maps hidden states to logits, one to each row of its weight; called on the labelled
            positions alone.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): Divisor of the sum; the number of labelled tokens of
            the whole accumulated global batch in training. Defaults to the number here.

    Returns:
        `torch.FloatTensor` of shape `()`: 0 where nothing is labelled.
    """
    targets = labels[:, 1:].to(hidden_states.device)
    labelled = targets != -100
    hidden_states, targets = hidden_states[:, :-1][labelled], targets[labelled]
    rows = max(1, MAX_LOGITS // len(lm_head.weight))
    if len(targets) <= rows:
        total = _summed_cross_entropy(hidden_states, targets, lm_head)
    else:
        slices = zip(hidden_states.split(rows), targets.split(rows), strict=True)
        total = torch.stack(
            [checkpoint(_summed_cross_entropy, *part, lm_head, use_reentrant=False) for part in slices]
        ).sum()
    return total / (labelled.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def _summed_cross_entropy(hidden_states, targets, lm_head):
    return F.cross_entropy(_at_least_float32(lm_head(hidden_states)), targets, reduction="sum")


@contextmanager
def _own_class(model: nn.Module) -> Iterator[None]:
    """FSDP2 gives a model a class made at run time, and transformers would save torch's source as the model's."""
    made = type(model)
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule

        if isinstance(model, FSDPModule):
            model.__class__ = made.__mro__[2]  # after its own class and FSDPModule, as in `FSDPModule.__new__`
    try:
        yield
    finally:
        model.__class__ = made


def _raise_if_random(name: str, loading_info: dict) -> None:
    missing, mismatched = sorted(loading_info["missing_keys"]), sorted(loading_info["mismatched_keys"])
    unexpected = sorted(loading_info["unexpected_keys"])
    if missing or mismatched:
        raise RuntimeError(
            f"Loading {name} would leave tensors random.\n"
            + (f"Missing from the checkpoint: {', '.join(missing)}.\n" if missing else "")
            + (f"Of another shape in the checkpoint: {', '.join(map(str, mismatched))}.\n" if mismatched else "")
            + (f"In the checkpoint, but not in the model: {', '.join(unexpected)}.\n" if unexpected else "")
            + "The checkpoint is incomplete, or was saved with another head or backbone than its config says."
        )


class _WithOneDimension(ConversionOps):
    """The temperature of checkpoints from before it had a dimension, which FSDP2 needs of every parameter."""

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        return {target_patterns[0]: tensor.reshape(1)}

    @property
    def reverse_op(self):
        return self


_TEMPERATURE = "embedding_head.logit_scale"
register_checkpoint_conversion_mapping(
    UniGDConfig.model_type, [WeightConverter(_TEMPERATURE, _TEMPERATURE, [_WithOneDimension()])], overwrite=True
)
UniGDModel.register_for_auto_class("AutoModel")
UniGDForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["UniGDForConditionalGeneration", "UniGDModel", "UniGDPreTrainedModel"]

"""The shapes of a model and of what is trained of it, counted on a model without storage (`torch.device("meta")`)."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText
from trl import get_peft_config

from ...modeling import UniGDConfig, UniGDForConditionalGeneration
from ..arguments import UniGDModelConfig, UniGDTrainingArguments
from ..loading import prepare_model
from ..vision import is_frozen, vision_parameters


# Numbers of a weight in 4 bits share a scale in blocks of 64: a float32, or 8 bits where the scales are quantised too
# (Dettmers et al., "QLoRA", 2023, section 3).
_BITS_4 = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64}
_SOFT_PROMPT_TOKENS = 24


@dataclass(frozen=True)
class Stack:
    """
    A stack of transformer layers.

    Attributes:
        width, layers, inner: Size of the hidden state, number of layers, and size inside their MLP.
        attention: Numbers of a token's query, and of its key: heads by the size of a head.
        matrices: Numbers of all weight matrices, without embeddings.
        gated: Whether an MLP has a gate beside its way up.
        adapted: Sum of the input sizes of all layers with a LoRA.
    """

    width: int
    layers: int
    inner: int
    attention: tuple[int, int]
    matrices: int
    gated: bool
    adapted: int


@dataclass(frozen=True)
class ModelShapes:
    """
    Attributes:
        name: The model, and how it is trained.
        parameters: Number of parameters, the adapter's included.
        trained: Number of those that are trained.
        weight_bytes: Of all parameters.
        sharded_weight_bytes: Of those that FSDP divides among devices: all but a frozen vision tower's.
        trained_bytes: Of the parameters that are trained, and so of their gradients.
        text, vision: The layers of the language model and of the vision tower.
        vocabulary: Number of logits.
        trains_text: Whether weights of the language model are trained themselves, without an adapter.
        trains_vision: Whether any of the tower is trained.
        image_size, patch_size: Of the tower, in pixels. `image_size` is None where it takes any.
        image_tokens: Tokens of an image, if the config fixes them.
        merged: Patches of the tower for each token of an image, where they are merged by the config.
    """

    name: str
    parameters: int
    trained: int
    weight_bytes: float
    sharded_weight_bytes: float
    trained_bytes: int
    text: Stack
    vision: Stack
    vocabulary: int
    trains_text: bool
    trains_vision: bool
    image_size: int | None
    patch_size: int
    image_tokens: int | None
    merged: int | None


def plan_model(model_args: UniGDModelConfig, args: UniGDTrainingArguments) -> ModelShapes:
    """
    The shapes of the model that `hf-unigd train` would train. Of the Hub or a folder, only its config is read. The
    soft prompts, whose number needs the tokenizer, are taken for 24 tokens.

    Args:
        model_args, args: The parsed arguments of `hf-unigd train`.

    Raises:
        ValueError: the model is a mixture of experts, or its config does not name what is needed.
    """
    name = model_args.model_name_or_path
    model = _make_model(model_args)
    config = model.config.vlm_config
    text, vision = config.get_text_config(), config.vision_config
    decoder = model.vlm.get_decoder()
    if any(parameter.dim() > 2 for parameter in decoder.parameters()):
        raise ValueError(f"{name} has experts or convolutions in its language model, which are not estimated.")
    tower = vision_parameters(model)
    quantised = _quantised(model, model_args)
    embeddings = model.get_input_embeddings().weight
    matrices = sum(each.numel() for each in decoder.parameters() if each.dim() == 2 and each is not embeddings)
    alone = model_args.soft_prompts_only
    peft_config = LoraConfig(target_modules=[]) if alone else get_peft_config(model_args)
    processor: Any = SimpleNamespace(
        soft_prompts=model_args.soft_prompts, soft_prompt_ids=list(range(_SOFT_PROMPT_TOKENS))
    )
    trained_model = prepare_model(model, processor, args, peft_config)
    heads = _first(text, "num_attention_heads", "n_head")
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    everything = list(trained_model.parameters())
    trained = [each for each in everything if each.requires_grad]
    adapted = [each for each in decoder.modules() if getattr(each, "lora_A", None)]
    weight_bytes = {id(each): each.numel() * quantised.get(id(each), each.element_size()) for each in everything}
    frozen_tower = sum(weight_bytes[id(each)] for each in tower) if is_frozen(model) else 0.0
    own = {id(each) for each in decoder.parameters()} if peft_config is None else set()
    vision_matrices = sum(each.numel() for each in tower if each.dim() >= 2)
    vision_heads = _first(vision, "num_attention_heads", "num_heads")
    vision_width = _first(vision, "hidden_size", "embed_dim")
    return ModelShapes(
        name=name,
        parameters=sum(each.numel() for each in everything),
        trained=sum(each.numel() for each in trained),
        weight_bytes=sum(weight_bytes.values()),
        sharded_weight_bytes=sum(weight_bytes.values()) - frozen_tower,
        trained_bytes=sum(each.numel() * each.element_size() for each in trained),
        text=Stack(
            width=text.hidden_size,
            layers=text.num_hidden_layers,
            inner=text.intermediate_size,
            attention=(heads * size, (getattr(text, "num_key_value_heads", None) or heads) * size),
            matrices=matrices,
            gated=any(name.endswith("gate_proj") for name, _ in decoder.named_modules()),
            adapted=sum(each.in_features for each in adapted),
        ),
        vision=Stack(
            width=vision_width,
            layers=_first(vision, "num_hidden_layers", "depth"),
            inner=vision.intermediate_size,
            attention=(vision_width, vision_width) if vision_heads else (0, 0),
            matrices=vision_matrices,
            gated=False,
            adapted=0,
        ),
        vocabulary=text.vocab_size,
        trains_text=any(id(each) in own for each in trained),
        trains_vision=not is_frozen(model),
        image_size=getattr(vision, "image_size", None),
        patch_size=vision.patch_size,
        image_tokens=getattr(config, "image_seq_length", None),
        merged=getattr(vision, "spatial_merge_size", 0) ** 2 or None,
    )


def _make_model(model_args: UniGDModelConfig) -> UniGDForConditionalGeneration:
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    head = {"head_type": model_args.head_type, "embedding_dim": model_args.embedding_dim}
    if isinstance(config, UniGDConfig):
        head = {"head_type": config.head_type, "embedding_dim": config.embedding_dim}
        config = config.vlm_config
    dtype = getattr(torch, str(model_args.dtype), None) or config.dtype or torch.float32
    with torch.device("meta"):
        vlm = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        return UniGDForConditionalGeneration.from_vlm(vlm, **head)


def _quantised(model: UniGDForConditionalGeneration, model_args: UniGDModelConfig) -> dict[int, float]:
    """The bytes of a number in each weight that bitsandbytes quantises: those of all linear layers but the last."""
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return {}
    size = 1.0 if model_args.load_in_8bit else _BITS_4[model_args.use_bnb_nested_quant]
    output = model.get_output_embeddings()
    linear = [each for each in model.vlm.modules() if isinstance(each, nn.Linear) and each is not output]
    return {id(each.weight): size for each in linear}


def _first(config: Any, *names: str) -> int:
    found = [getattr(config, name) for name in names if getattr(config, name, None) is not None]
    if not found:
        raise ValueError(f"The {config.model_type} config names neither of {', '.join(names)}.")
    return found[0]

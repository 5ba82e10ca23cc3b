"""What the builders of all families share."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast, ProcessorMixin


CORPUS = [
    "Summarize the provided image in one word",
    "Summarize the provided text in one word",
    "USER: ASSISTANT: user assistant system a red cat and two blue dogs on the green grass",
    "A large picture of a small yellow car, seen from the left, with three people waving from its windows.",
]

BUILDERS: dict[str, Callable] = {}
_STAND_INS: dict[str, str] = {}

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def family(name: str, stand_ins: str = ""):
    """Registers a builder, a function that returns a config and a processor, under the name of its family.

    Args:
        name: The family's name, in most cases its `model_type`.
        stand_ins: What stands in for a part of the processor that needs torchvision. Empty if nothing does.
    """

    def register(builder):
        BUILDERS[name] = builder
        _STAND_INS[name] = stand_ins
        return builder

    return register


def stand_ins(name: str) -> str:
    """What stands in for a part of a family's processor that needs torchvision. Empty if nothing does."""
    return _STAND_INS[name]


@dataclass
class TinyVLM:
    model: torch.nn.Module
    processor: ProcessorMixin


def make_vlm(family: str = "llava", seed: int = 0, **from_config_kwargs) -> TinyVLM:
    """Returns a randomly initialised backbone of the family in eval mode, and its processor."""
    config, processor = BUILDERS[family]()
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, **from_config_kwargs).eval()
    return TinyVLM(model, processor)


def make_image(seed: int = 0, size: tuple[int, int] = (24, 20)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def make_tokenizer(special_tokens, bos=None, eos="</s>", **named):
    """A byte-level BPE tokenizer trained on a few sentences.

    Args:
        special_tokens: Its special tokens, besides those of padding, beginning and end.
        bos, eos: The tokens of beginning and end.
        named: Special tokens that the tokenizer has attributes of: `image_token="<image>"` sets `image_token` and
            `image_token_id`.
    """
    special_tokens = list(dict.fromkeys([*special_tokens, *named.values()]))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400 + len(special_tokens),
        special_tokens=["<pad>", *([bos] if bos else []), eos, *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token=bos, eos_token=eos, extra_special_tokens=named
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special_tokens})
    return tokenizer


def ids_of(tokenizer, **tokens) -> dict[str, int]:
    """The ids of tokens, by the names that a config calls them."""
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def text_config(model_type, tokenizer, **kwargs) -> dict:
    return {
        "model_type": model_type,
        "vocab_size": len(tokenizer) + 4,  # with a few unused rows, like released checkpoints
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **kwargs,
    }


def images_only(processor_class, *args, **kwargs):
    """A processor of a class that also wants processors of videos and sounds, which need torchvision or torchaudio.

    It has the class's name, so that what it saves names the real one.
    """
    left_out = [name for name in processor_class.get_attributes() if name.startswith(("video_", "feature_"))]

    class ImagesOnly(processor_class):
        @classmethod
        def get_attributes(cls):
            return [name for name in processor_class.get_attributes() if cls.complete is False or name not in left_out]

    ImagesOnly.__name__ = processor_class.__name__
    ImagesOnly.complete = False
    with mock.patch.object(ProcessorMixin, "check_argument_for_proper_class"):
        processor = ImagesOnly(*args, **dict.fromkeys(left_out), **kwargs)
    ImagesOnly.complete = True
    for name in left_out:
        del vars(processor)[name]
    ImagesOnly.video_processor = SimpleNamespace(num_frames=1, fps=1)  # SmolVLM's template is rendered with them
    return processor

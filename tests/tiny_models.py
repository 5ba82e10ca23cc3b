"""Tiny vision-language models of every supported family and their processors, built in code without downloads."""

from dataclasses import dataclass

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
)


FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_vl")

CORPUS = [
    "Summarize the provided image in one word",
    "Summarize the provided text in one word",
    "USER: ASSISTANT: user assistant system a red cat and two blue dogs on the green grass",
    "A large picture of a small yellow car, seen from the left, with three people waving from its windows.",
]

LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ image_placeholder }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Gemma's: the assistant is called model, and turns end with a mark and a line break.
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<start_of_image>' }}{% else %}"
    "{{ c['text'] | trim }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


# transformers builds these two only with a video processor, which needs torchvision. The tests use images only.
class ImageOnevisionProcessor(LlavaOnevisionProcessor):
    def __init__(self, image_processor, tokenizer, num_image_tokens, chat_template):
        self.num_image_tokens = num_image_tokens
        self.vision_feature_select_strategy = "full"
        self.vision_aspect_ratio = "anyres_max_9"
        self.image_token, self.image_token_id = "<image>", tokenizer.convert_tokens_to_ids("<image>")
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class ImageQwen2VLProcessor(Qwen2VLProcessor):
    def __init__(self, image_processor, tokenizer, chat_template):
        self.image_token, self.image_token_id = "<|image_pad|>", tokenizer.convert_tokens_to_ids("<|image_pad|>")
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class ImageQwen3VLProcessor(Qwen3VLProcessor):
    def __init__(self, image_processor, tokenizer, chat_template):
        self.image_token, self.image_token_id = "<|image_pad|>", tokenizer.convert_tokens_to_ids("<|image_pad|>")
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


@dataclass
class TinyVLM:
    model: torch.nn.Module
    processor: object


def make_tokenizer(special_tokens, bos=None, eos="</s>"):
    """A byte-level BPE tokenizer trained on a few sentences."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", *([bos] if bos else []), eos, *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token=bos, eos_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special_tokens)})
    return tokenizer


def _text_config(model_type, tokenizer, **kwargs):
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


_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def _llava():
    tokenizer = make_tokenizer(["<image>"], bos="<s>")
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **_VISION},
        text_config=_text_config("llama", tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return config, processor


def _llava_next():
    tokenizer = make_tokenizer(["<image>"], bos="<s>")
    pinpoints = [[16, 32], [32, 16], [32, 32]]
    config = LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **_VISION},
        text_config=_text_config("llama", tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
    )
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=pinpoints
        ),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return config, processor


def _llava_onevision():
    tokenizer = make_tokenizer(["<image>", "<video>", "<|im_start|>"], eos="<|im_end|>")
    pinpoints = [[16, 16], [16, 32], [32, 16], [32, 32]]
    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, **_VISION},
        text_config=_text_config("qwen2", tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_9",
    )
    processor = ImageOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size={"height": 16, "width": 16}, image_grid_pinpoints=pinpoints),
        tokenizer,
        num_image_tokens=4,
        chat_template=QWEN_TEMPLATE.replace("image_placeholder", "'<image>\n'"),
    )
    return config, processor


QWEN_VL_TEMPLATE = QWEN_TEMPLATE.replace("image_placeholder", "'<|vision_start|><|image_pad|><|vision_end|>'")


def _qwen_tokenizer():
    """The tokenizer of a Qwen-VL, and the ids of its special tokens as its config names them."""
    names = {"vision_start": "vision_start", "vision_end": "vision_end", "image": "image_pad", "video": "video_pad"}
    tokens = {name: f"<|{token}|>" for name, token in names.items()}
    tokenizer = make_tokenizer(["<|im_start|>", *tokens.values()], eos="<|im_end|>")
    return tokenizer, {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def _qwen2_vl():
    tokenizer, ids = _qwen_tokenizer()
    config = Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 8,
        },
        text_config=_text_config(
            "qwen2_vl_text",
            tokenizer,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        ),
        **ids,
        tie_word_embeddings=True,
    )
    sizes = {"patch_size": 8, "min_pixels": 16 * 16, "max_pixels": 32 * 32}
    processor = ImageQwen2VLProcessor(
        Qwen2VLImageProcessorPil(**sizes),
        tokenizer,
        chat_template=QWEN_VL_TEMPLATE,
    )
    return config, processor


def _qwen3_vl():
    """Its vision tower returns features of inner layers too, which the language model adds to its own."""
    tokenizer, ids = _qwen_tokenizer()
    config = Qwen3VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 8,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 16,
        },
        text_config=_text_config(
            "qwen3_vl_text",
            tokenizer,
            head_dim=8,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        ),
        **ids,
        tie_word_embeddings=True,
    )
    processor = ImageQwen3VLProcessor(
        Qwen2VLImageProcessorPil(patch_size=8, min_pixels=16 * 16, max_pixels=32 * 32),
        tokenizer,
        chat_template=QWEN_VL_TEMPLATE,
    )
    return config, processor


def _gemma3():
    """Its vision tower returns one tensor for all images, and its images attend in both directions."""
    tokenizer = make_tokenizer(
        ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"], bos="<bos>"
    )
    for name, token in (("boi", "<start_of_image>"), ("eoi", "<end_of_image>"), ("image", "<image_soft_token>")):
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    config = Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 4, **_VISION},
        text_config=_text_config("gemma3_text", tokenizer, head_dim=8, tie_word_embeddings=True),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        tie_word_embeddings=True,
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 16, "width": 16}),
        tokenizer,
        chat_template=GEMMA_TEMPLATE,
        image_seq_length=4,
    )
    return config, processor


_BUILDERS = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
    "gemma3": _gemma3,
}


def make_vlm(family: str = "llava", seed: int = 0, **from_config_kwargs) -> TinyVLM:
    """Returns a randomly initialised backbone of the family in eval mode, and its processor."""
    config, processor = _BUILDERS[family]()
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, **from_config_kwargs).eval()
    return TinyVLM(model, processor)


def make_image(seed: int = 0, size: tuple[int, int] = (24, 20)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())

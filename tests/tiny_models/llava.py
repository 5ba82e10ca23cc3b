"""LLaVA and the families that put a vision tower and a projector before a language model as it does."""

from transformers import (
    CLIPImageProcessorPil,
    DeepseekVLConfig,
    DeepseekVLImageProcessorPil,
    DeepseekVLProcessor,
    FastVlmConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    VipLlavaConfig,
)

from .building import VISION, family, ids_of, images_only, make_tokenizer, text_config


# As released: all images of a turn first, each on a line of its own.
LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# As released: a role is followed by a space, and by a line break where an answer is wanted.
ONEVISION_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ '\n' + c['text'] }}{% endfor %}{{ '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEEPSEEK_TEMPLATE = (
    "{% for m in messages %}{{ {'user': 'User', 'assistant': 'Assistant'}[m['role']] + ': ' }}"
    "{% for c in m['content'] %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{% if c['type'] == 'image' %}{{ '<image_placeholder>' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)


def _clip_processor(processor_class, tokenizer, patch_size=8, **kwargs):
    return processor_class(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer,
        patch_size=patch_size,
        chat_template=LLAVA_TEMPLATE,
        **kwargs,
    )


def _clip(**kwargs):
    return {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **VISION, **kwargs}


@family("llava")
def _llava():
    tokenizer = make_tokenizer(["<image>"], bos="<s>")
    config = LlavaConfig(
        vision_config=_clip(),
        text_config=text_config("llama", tokenizer),
        **ids_of(tokenizer, image_token_id="<image>"),
        image_seq_length=4,
    )
    processor = _clip_processor(
        LlavaProcessor, tokenizer, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return config, processor


@family("vipllava")
def _vipllava():
    tokenizer = make_tokenizer(["<image>"], bos="<s>")
    config = VipLlavaConfig(
        vision_config=_clip(num_hidden_layers=11),  # five of them are read
        text_config=text_config("llama", tokenizer),
        **ids_of(tokenizer, image_token_index="<image>"),
        image_seq_length=4,
    )
    processor = _clip_processor(
        LlavaProcessor, tokenizer, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return config, processor


@family("llava_next")
def _llava_next():
    tokenizer = make_tokenizer(["<image>"], bos="<s>")
    pinpoints = [[16, 32], [32, 16], [32, 32]]
    config = LlavaNextConfig(
        vision_config=_clip(),
        text_config=text_config("llama", tokenizer),
        **ids_of(tokenizer, image_token_id="<image>"),
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


@family("llava_onevision", stand_ins="no video processor")
def _llava_onevision():
    tokenizer = make_tokenizer(["<image>", "<video>", "<|im_start|>"], eos="<|im_end|>")
    pinpoints = [[16, 16], [16, 32], [32, 16], [32, 32]]
    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, **VISION},
        text_config=text_config("qwen2", tokenizer),
        **ids_of(tokenizer, image_token_id="<image>", video_token_id="<video>"),
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_9",
    )
    processor = images_only(
        LlavaOnevisionProcessor,
        image_processor=LlavaOnevisionImageProcessorPil(
            size={"height": 16, "width": 16}, image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokenizer,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=ONEVISION_TEMPLATE,
    )
    return config, processor


@family("fast_vlm")
def _fast_vlm():
    """Its tower is a convolutional network of timm, which is no dependency of ours. A ResNet stands for it."""
    tokenizer = make_tokenizer(["<image>"], eos="<|im_end|>")
    tower = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
    config = FastVlmConfig(
        vision_config={**tower, "layer_type": "basic", "hidden_size": 32},
        text_config=text_config("qwen2", tokenizer),
        **ids_of(tokenizer, image_token_index="<image>"),
        image_seq_length=4,
    )
    processor = _clip_processor(
        LlavaProcessor, tokenizer, vision_feature_select_strategy="full", num_additional_image_tokens=0
    )
    return config, processor


@family("deepseek_vl")
def _deepseek_vl():
    tokenizer = make_tokenizer([], bos="<s>", image_token="<image_placeholder>")
    config = DeepseekVLConfig(
        vision_config={"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, **VISION},
        text_config=text_config("llama", tokenizer, tie_word_embeddings=False),
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )
    processor = DeepseekVLProcessor(
        DeepseekVLImageProcessorPil(size={"height": 16, "width": 16}, min_size=8),
        tokenizer,
        chat_template=DEEPSEEK_TEMPLATE,
        num_image_tokens=4,
    )
    return config, processor

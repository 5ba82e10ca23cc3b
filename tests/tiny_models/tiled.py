"""Families that make a fixed number of tokens of an image, or of each of its tiles."""

import numpy as np
from transformers import (
    AyaVisionConfig,
    AyaVisionProcessor,
    BatchFeature,
    Cohere2VisionConfig,
    Cohere2VisionProcessor,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLProcessor,
    JanusConfig,
    JanusImageProcessorPil,
    JanusProcessor,
    Lfm2VlConfig,
    Lfm2VlProcessor,
    Ovis2Config,
    Ovis2ImageProcessorPil,
    Ovis2Processor,
    PerceptionLMConfig,
    PerceptionLMProcessor,
    Siglip2ImageProcessorPil,
)

from .building import VISION, family, ids_of, images_only, make_tokenizer, text_config
from .qwen import QWEN_TEMPLATE


COHERE_TEMPLATE = (
    "{{ '<BOS_TOKEN>' }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' + ('<|CHATBOT_TOKEN|>' "
    "if m['role'] == 'assistant' else '<|' + m['role'].upper() + '_TOKEN|>') }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ image_placeholder }}{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}"
    "{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<|image|>' }}{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
JANUS_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'].title() + '|>: ' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image_placeholder>\n' }}{% else %}{{ c['text'] + '\n' }}{% endif %}"
    "{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|>:' }}{% endif %}"
)

_COHERE_TURNS = [
    "<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|END_OF_TURN_TOKEN|>",
]  # fmt: skip


def _siglip(patch_size=4, **kwargs):
    return {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": patch_size, **VISION, **kwargs}


def _tiles(**kwargs):
    return GotOcr2ImageProcessorPil(
        size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=4, **kwargs
    )


@family("internvl", stand_ins="no video processor")
def _internvl():
    tokenizer = make_tokenizer(
        ["<|im_start|>"],
        eos="<|im_end|>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = InternVLConfig(
        vision_config={"image_size": (16, 16), "patch_size": (4, 4), **VISION},
        text_config=text_config("qwen2", tokenizer),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    processor = images_only(
        InternVLProcessor,
        image_processor=_tiles(),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=QWEN_TEMPLATE.replace("image_placeholder", "'<IMG_CONTEXT>\n'"),
    )
    return config, processor


@family("aya_vision")
def _aya_vision():
    marks = ["<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"]
    tokenizer = make_tokenizer([*marks, *_COHERE_TURNS, "TILE", "TILE_GLOBAL"], bos="<BOS_TOKEN>")
    config = AyaVisionConfig(
        vision_config=_siglip(),
        text_config=text_config("cohere2", tokenizer, sliding_window=16, logit_scale=0.25, tie_word_embeddings=True),
        **ids_of(tokenizer, image_token_index="<|IMG_PATCH|>"),
        downsample_factor=2,
        tie_word_embeddings=True,
    )
    processor = AyaVisionProcessor(
        _tiles(),
        tokenizer,
        patch_size=4,
        img_size=16,
        downsample_factor=2,
        chat_template=COHERE_TEMPLATE.replace("image_placeholder", "'<image>'"),
    )
    return config, processor


class CohereTiles(GotOcr2ImageProcessorPil):
    """Stands in for Command A Vision's image processor, which needs torchvision."""

    patch_size = 2  # as its processor reads it: tokens along a tile's side


@family("cohere2_vision", stand_ins="image processor")
def _cohere2_vision():
    tokenizer = make_tokenizer(
        _COHERE_TURNS,
        bos="<BOS_TOKEN>",
        boi_token="<|START_OF_IMG|>",
        eoi_token="<|END_OF_IMG|>",
        image_token="<|IMG_PATCH|>",
        img_line_break_token="<|IMG_LINE_BREAK|>",
    )
    config = Cohere2VisionConfig(
        vision_config=_siglip(),
        text_config=text_config("cohere2", tokenizer, sliding_window=16, logit_scale=0.25, tie_word_embeddings=True),
        image_token_id=tokenizer.image_token_id,
        downsample_factor=2,
        alignment_intermediate_size=48,
        tie_word_embeddings=True,
    )
    image_processor = CohereTiles(size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=4)
    processor = Cohere2VisionProcessor(
        image_processor,
        tokenizer,
        chat_template=COHERE_TEMPLATE.replace("image_placeholder", "'<|IMG_PATCH|>'"),
    )
    return config, processor


@family("ovis2")
def _ovis2():
    """Its processor puts other tokens than the image token of the text in an image's place."""
    indicators = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    tokenizer = make_tokenizer(["<image>", "<IMG_ATOM>", *indicators, "<|im_start|>"], eos="<|im_end|>")
    text = text_config("qwen2", tokenizer)
    config = Ovis2Config(
        vision_config={
            "image_size": 16, "patch_size": 4, "hidden_stride": 2, "vocab_size": 40, **VISION,
        },
        text_config=text,
        **ids_of(tokenizer, image_token_id="<IMG_ATOM>"),
        visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(indicators),
        vocab_size=text["vocab_size"],
        hidden_size=32,
        tie_word_embeddings=False,
    )  # fmt: skip
    processor = Ovis2Processor(
        Ovis2ImageProcessorPil(size={"height": 16, "width": 16}, max_patches=4),
        tokenizer,
        image_seq_length=4,
        chat_template=QWEN_TEMPLATE.replace("image_placeholder", "'<image>\n'"),
    )
    return config, processor


class LfmKwargs(Siglip2ImageProcessorPil.valid_kwargs, total=False):
    return_row_col_info: bool


class LfmPatches(Siglip2ImageProcessorPil):
    """Stands in for LFM2-VL's image processor, which needs torchvision: one tile for each image."""

    valid_kwargs = LfmKwargs
    tile_size, downsample_factor, encoder_patch_size, use_thumbnail = 16, 2, 4, True
    model_input_names = ["pixel_values", "pixel_attention_mask", "spatial_shapes"]  # noqa: RUF012

    def preprocess(self, images, return_row_col_info=False, **kwargs):
        flat = [image for row in images for image in row] if isinstance(images[0], (list, tuple)) else images
        inputs = super().preprocess([image.resize((16, 8)) for image in flat], **{**kwargs, "return_tensors": "pt"})
        if return_row_col_info:
            sizes = (np.array(inputs["spatial_shapes"]) * self.patch_size).tolist()
            inputs.update(image_rows=[1] * len(flat), image_cols=[1] * len(flat), image_sizes=sizes)
        return BatchFeature(inputs)


@family("lfm2_vl", stand_ins="image processor")
def _lfm2_vl():
    """A layer of convolution and one of attention."""
    marks = ["<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", "<|im_start|>"]
    tokenizer = make_tokenizer(marks, bos="<|startoftext|>", eos="<|im_end|>")
    config = Lfm2VlConfig(
        vision_config={"model_type": "siglip2_vision_model", "patch_size": 4, "num_patches": 16, **VISION},
        text_config=text_config(
            "lfm2", tokenizer, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False,
            tie_word_embeddings=True,
        ),
        **ids_of(tokenizer, image_token_id="<image>"),
        projector_hidden_size=32,
        downsample_factor=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    processor = Lfm2VlProcessor(
        LfmPatches(patch_size=4, max_num_patches=8),
        tokenizer,
        chat_template="{{ bos_token }}" + QWEN_TEMPLATE.replace("image_placeholder", "'<image>'"),
    )
    return config, processor


class PerceptionTiles(GotOcr2ImageProcessorPil):
    """Stands in for PerceptionLM's image processor, which needs torchvision: a thumbnail for each image."""

    tile_size, max_num_tiles, vision_input_type = 16, 1, "vanilla"

    def preprocess(self, images, **kwargs):
        inputs = super().preprocess(images, **{**kwargs, "crop_to_patches": False, "return_tensors": "pt"})
        return BatchFeature({"pixel_values": inputs["pixel_values"][:, None]})


@family("perception_lm", stand_ins="image processor; no video processor")
def _perception_lm():
    """Its tower is of timm, which is no dependency of ours. CLIP's stands for it."""
    tokenizer = make_tokenizer(
        ["<|start_header_id|>", "<|end_header_id|>"],
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        image_token="<|image|>",
        video_token="<|video|>",
    )
    config = PerceptionLMConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "image_size": 16,
            "patch_size": 4,
            **VISION,
            "model_args": {"embed_dim": 32},
        },
        text_config=text_config("llama", tokenizer, tie_word_embeddings=True),
        vision_use_cls_token=True,
        projector_pooling_ratio=2,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        tie_word_embeddings=True,
    )
    processor = images_only(
        PerceptionLMProcessor,
        image_processor=PerceptionTiles(size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=4,
        pooling_ratio=2,
        chat_template=LLAMA_TEMPLATE,
    )
    return config, processor


@family("janus")
def _janus():
    tokenizer = make_tokenizer(
        ["<|User|>", "<|Assistant|>"],
        bos="<s>",
        image_token="<image_placeholder>",
        boi_token="<begin_of_image>",
        eoi_token="<end_of_image>",
    )
    config = JanusConfig(
        vision_config={
            "image_size": 16, "patch_size": 8, "projection_dim": 32, "num_image_tokens": 4, **VISION,
        },
        vq_config={"base_channels": 32, "channel_multiplier": [1, 1], "num_embeddings": 16, "latent_channels": 32,
                   "num_patches": 4, "image_token_embed_dim": 32, "projection_dim": 32, "embed_dim": 8},
        text_config=text_config("llama", tokenizer, tie_word_embeddings=False),
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )  # fmt: skip
    processor = JanusProcessor(
        JanusImageProcessorPil(size={"height": 16, "width": 16}, min_size=8),
        tokenizer,
        num_image_tokens=4,
        chat_template=JANUS_TEMPLATE,
    )
    return config, processor

"""Qwen-VL, and the families whose tower takes images of any size as it does."""

from transformers import (
    BatchFeature,
    Glm4vConfig,
    Glm4vImageProcessorPil,
    Glm4vProcessor,
    Kimi_K25Config,
    Kimi_K25Processor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3_5Config,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    Qwen3VLProcessor,
)

from .building import family, ids_of, images_only, make_tokenizer, text_config


QWEN_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ image_placeholder }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_VL_TEMPLATE = QWEN_TEMPLATE.replace("image_placeholder", "'<|vision_start|><|image_pad|><|vision_end|>'")
# A generation prompt that begins the thoughts, which an answer closes without any.
QWEN_THINKING_TEMPLATE = QWEN_VL_TEMPLATE.replace(
    "+ m['role'] + '\n' }}", "+ m['role'] + '\n' + ('<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '') }}"
).replace("<|im_start|>assistant\n'", "<|im_start|>assistant\n<think>\n'")
GLM_TEMPLATE = (
    "{{ '[gMASK]<sop>\n' }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<|begin_of_image|><|image|><|end_of_image|>' }}{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
KIMI_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_' + m['role'] + '|>' + m['role'] + '<|im_middle|>' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n' }}"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_assistant|>assistant<|im_middle|>' }}{% endif %}"
)

_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 8,
    "out_hidden_size": 32,
}
_VIDEO = "no video processor"


def _qwen_tokenizer(*more):
    """The tokenizer of a Qwen-VL, and the ids of its special tokens as its config names them."""
    names = {"vision_start": "vision_start", "vision_end": "vision_end", "image": "image_pad", "video": "video_pad"}
    tokens = {f"{name}_token_id": f"<|{token}|>" for name, token in names.items()}
    tokenizer = make_tokenizer(["<|im_start|>", *tokens.values(), *more], eos="<|im_end|>")
    return tokenizer, ids_of(tokenizer, **tokens)


def _qwen_processor(processor_class, tokenizer, template=QWEN_VL_TEMPLATE):
    image_processor = Qwen2VLImageProcessorPil(patch_size=8, min_pixels=16 * 16, max_pixels=32 * 32)
    return images_only(processor_class, image_processor=image_processor, tokenizer=tokenizer, chat_template=template)


@family("qwen2_vl", stand_ins=_VIDEO)
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
        text_config=text_config("qwen2_vl_text", tokenizer, tie_word_embeddings=True, rope_parameters=_ROPE),
        **ids,
        tie_word_embeddings=True,
    )
    return config, _qwen_processor(Qwen2VLProcessor, tokenizer)


@family("qwen2_5_vl", stand_ins=_VIDEO)
def _qwen2_5_vl():
    tokenizer, ids = _qwen_tokenizer()
    config = Qwen2_5_VLConfig(
        vision_config={**_TOWER, "window_size": 32, "fullatt_block_indexes": [1]},
        text_config=text_config("qwen2_5_vl_text", tokenizer, rope_parameters=_ROPE),
        **ids,
    )
    return config, _qwen_processor(Qwen2_5_VLProcessor, tokenizer)


def _qwen3_vl_config(config_class, text_model_type, tokenizer, ids, tie_word_embeddings, **kwargs):
    """Its vision tower returns features of inner layers too, which the language model adds to its own."""
    kwargs = {"head_dim": 8, "tie_word_embeddings": tie_word_embeddings, "rope_parameters": _ROPE, **kwargs}
    return config_class(
        vision_config={**_TOWER, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        text_config=text_config(text_model_type, tokenizer, **kwargs),
        **ids,
        tie_word_embeddings=tie_word_embeddings,
    )


@family("qwen3_vl", stand_ins=_VIDEO)
def _qwen3_vl():
    tokenizer, ids = _qwen_tokenizer()
    config = _qwen3_vl_config(Qwen3VLConfig, "qwen3_vl_text", tokenizer, ids, True)
    return config, _qwen_processor(Qwen3VLProcessor, tokenizer)


@family("qwen3_vl_moe", stand_ins=_VIDEO)
def _qwen3_vl_moe():
    tokenizer, ids = _qwen_tokenizer()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = _qwen3_vl_config(Qwen3VLMoeConfig, "qwen3_vl_moe_text", tokenizer, ids, False, **experts)
    return config, _qwen_processor(Qwen3VLProcessor, tokenizer)


@family("qwen3_5", stand_ins=_VIDEO)
def _qwen3_5():
    """A layer of linear attention and one of full attention, and a template that thinks."""
    tokenizer, ids = _qwen_tokenizer("<think>", "</think>")
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    config = Qwen3_5Config(
        vision_config={**_TOWER, "num_position_embeddings": 16},
        text_config=text_config(
            "qwen3_5_text",
            tokenizer,
            head_dim=8,
            layer_types=["linear_attention", "full_attention"],
            linear_num_value_heads=4,
            rope_parameters={**_ROPE, "partial_rotary_factor": 1.0, "mrope_interleaved": True},
            **linear,
        ),
        **ids,
    )
    return config, _qwen_processor(Qwen3VLProcessor, tokenizer, QWEN_THINKING_TEMPLATE)


@family("glm4v", stand_ins=_VIDEO)
def _glm4v():
    names = ("begin_of_image", "end_of_image", "begin_of_video", "end_of_video", "image", "video")
    roles = ["<|user|>", "<|assistant|>", "[gMASK]", "<sop>"]
    tokenizer = make_tokenizer([*(f"<|{name}|>" for name in names), *roles], eos="<|endoftext|>")
    config = Glm4vConfig(
        vision_config={**_TOWER, "image_size": 32},
        text_config=text_config("glm4v_text", tokenizer, rope_parameters={**_ROPE, "partial_rotary_factor": 1.0}),
        **ids_of(
            tokenizer,
            image_token_id="<|image|>",
            video_token_id="<|video|>",
            image_start_token_id="<|begin_of_image|>",
            image_end_token_id="<|end_of_image|>",
            video_start_token_id="<|begin_of_video|>",
            video_end_token_id="<|end_of_video|>",
        ),
    )
    processor = images_only(
        Glm4vProcessor,
        image_processor=Glm4vImageProcessorPil(
            patch_size=8, size={"shortest_edge": 2 * 16 * 16, "longest_edge": 2 * 32 * 32}
        ),
        tokenizer=tokenizer,
        chat_template=GLM_TEMPLATE,
    )
    return config, processor


class KimiImageProcessor(Qwen2VLImageProcessorPil):
    """Stands in for Kimi's, which needs torchvision: patches as images, and one frame."""

    def preprocess(self, images, **kwargs):
        inputs = super().preprocess(images, **kwargs)
        patches = inputs["pixel_values"].reshape(len(inputs["pixel_values"]), 3, -1, self.patch_size, self.patch_size)
        return BatchFeature({"pixel_values": patches[:, :, 0], "image_grid_thw": inputs["image_grid_thw"]})


@family("kimi_k25", stand_ins="image processor; no video processor")
def _kimi_k25():
    media = ["<|media_begin|>", "<|media_content|>", "<|media_pad|>", "<|media_end|>", "<|video|>"]
    tokenizer = make_tokenizer(
        [*media, "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"], eos="<|im_end|>"
    )
    config = Kimi_K25Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "patch_size": 8,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
        },
        text_config=text_config(
            "deepseek_v3",
            tokenizer,
            num_key_value_heads=4,
            first_k_dense_replace=1,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
            tie_word_embeddings=False,
        ),
        projection_hidden_size=32,
        **ids_of(
            tokenizer,
            image_token_id="<|media_pad|>",
            video_token_id="<|video|>",
            vision_start_token_id="<|media_begin|>",
            vision_end_token_id="<|media_end|>",
        ),
        tie_word_embeddings=False,
    )
    processor = images_only(
        Kimi_K25Processor,
        image_processor=KimiImageProcessor(patch_size=8, min_pixels=16 * 16, max_pixels=32 * 32),
        tokenizer=tokenizer,
        chat_template=KIMI_TEMPLATE,
    )
    return config, processor

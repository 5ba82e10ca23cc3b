"""Gemma's families, whose images attend in both directions."""

from transformers import (
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma4Config,
    Gemma4ImageProcessorPil,
)

from .building import VISION, family, images_only, make_tokenizer, text_config


# The assistant is called model, and turns end with a mark and a line break.
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<start_of_image>' }}{% else %}"
    "{{ c['text'] | trim }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA4_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '\n\n<|image|>\n\n' }}{% else %}"
    "{{ c['text'] | trim }}{% endif %}{% endfor %}{{ '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"
)


@family("gemma3")
def _gemma3():
    """Its vision tower returns one tensor for all images, and its attention has a window."""
    tokenizer = make_tokenizer(
        ["<start_of_turn>", "<end_of_turn>"],
        bos="<bos>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    config = Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 4, **VISION},
        text_config=text_config(
            "gemma3_text", tokenizer, head_dim=8, query_pre_attn_scalar=8, sliding_window=16, tie_word_embeddings=True
        ),
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


@family("gemma4", stand_ins="no video processor, no feature extractor")
def _gemma4():
    """Its logits are capped, and each layer has an embedding of its own of each token."""
    from transformers import Gemma4Processor  # transformers 5.20 cannot import it without torchvision

    tokenizer = make_tokenizer(
        ["<|turn>", "<turn|>"],
        bos="<bos>",
        boi_token="<|image>",
        eoi_token="<image|>",
        image_token="<|image|>",
        boa_token="<|audio>",
        eoa_token="<audio|>",
        audio_token="<|audio|>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|video|>"]}, replace_extra_special_tokens=False)
    config = Gemma4Config(
        vision_config={
            **VISION,
            "head_dim": 8,
            "num_key_value_heads": 4,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        text_config=text_config(
            "gemma4_text",
            tokenizer,
            head_dim=8,
            global_head_dim=8,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=len(tokenizer) + 4,
            final_logit_softcapping=30.0,
            use_bidirectional_attention="vision",
            tie_word_embeddings=True,
        ),
        audio_config=None,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        boa_token_id=tokenizer.boa_token_id,
        eoa_token_index=tokenizer.eoa_token_id,
        audio_token_id=tokenizer.audio_token_id,
        tie_word_embeddings=True,
    )
    processor = images_only(
        Gemma4Processor,
        image_processor=Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70),
        tokenizer=tokenizer,
        chat_template=GEMMA4_TEMPLATE,
        image_seq_length=70,
    )
    return config, processor

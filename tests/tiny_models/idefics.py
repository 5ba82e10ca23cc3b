"""Idefics3 and SmolVLM, which cut images into tiles with a mark before each."""

from transformers import (
    Idefics3Config,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    SmolVLMConfig,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)

from .building import VISION, family, ids_of, images_only, make_tokenizer, text_config


# As released: a turn that begins with an image has no space after the colon.
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}{{ '<image>' }}{% endif %}"
    "{% endfor %}{{ '<end_of_utterance>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def _idefics(config_class, image_processor_class, process):
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)]
    tokenizer = make_tokenizer(
        ["<image>", "<fake_token_around_image>", "<global-img>", "<|im_start|>", "<video>", *tiles],
        eos="<end_of_utterance>",
    )
    config = config_class(
        vision_config={"image_size": 16, "patch_size": 4, **VISION},
        text_config=text_config("llama", tokenizer, tie_word_embeddings=True),
        **ids_of(tokenizer, image_token_id="<image>"),
        scale_factor=2,
        tie_word_embeddings=True,
    )
    image_processor = image_processor_class(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return config, process(image_processor, tokenizer)


@family("idefics3")
def _idefics3():
    return _idefics(
        Idefics3Config,
        Idefics3ImageProcessorPil,
        lambda images, tokenizer: Idefics3Processor(
            images, tokenizer, image_seq_len=4, chat_template=SMOLVLM_TEMPLATE
        ),
    )


@family("smolvlm", stand_ins="no video processor")
def _smolvlm():
    return _idefics(
        SmolVLMConfig,
        SmolVLMImageProcessorPil,
        lambda images, tokenizer: images_only(
            SmolVLMProcessor,
            image_processor=images,
            tokenizer=tokenizer,
            image_seq_len=4,
            chat_template=SMOLVLM_TEMPLATE,
        ),
    )

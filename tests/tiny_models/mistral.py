"""Pixtral and Mistral 3, whose images are rows of tokens with a break after each."""

import sys
from importlib import import_module
from unittest import mock

from transformers import LlavaConfig, Mistral3Config, PixtralImageProcessorPil

from .building import VISION, family, ids_of, make_tokenizer, text_config


_FOLDER = "transformers.models.pixtral"
# The processor takes one function from the file of the image processor that needs torchvision. The other has it too.
_PIL = import_module(PixtralImageProcessorPil.__module__)
with mock.patch.dict(sys.modules, {f"{_FOLDER}.image_processing_pixtral": _PIL}):
    PixtralProcessor = import_module(f"{_FOLDER}.processing_pixtral").PixtralProcessor

# As released: the system's turn gets today's date.
MISTRAL_TEMPLATE = (
    "{%- set today = strftime_now('%Y-%m-%d') %}{{ bos_token }}{% if messages[0]['role'] != 'system' %}"
    "{{ '[SYSTEM_PROMPT]The current date is ' + today + '.[/SYSTEM_PROMPT]' }}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ m['content'][0]['text'] + eos_token }}{% elif m['role'] == 'system' %}"
    "{{ '[SYSTEM_PROMPT]' + m['content'][0]['text'] + '[/SYSTEM_PROMPT]' }}{% else %}{{ '[INST]' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '[IMG]' }}{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{{ '[/INST]' }}{% endif %}{% endfor %}"
)


def _parts(spatial_merge_size):
    marks = ["[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    tokenizer = make_tokenizer(marks, bos="<s>")
    vision_config = {"model_type": "pixtral", "image_size": 32, "patch_size": 4, **VISION}
    processor = PixtralProcessor(
        PixtralImageProcessorPil(patch_size=4, size={"longest_edge": 32}),
        tokenizer,
        patch_size=4,
        spatial_merge_size=spatial_merge_size,
        chat_template=MISTRAL_TEMPLATE,
    )
    return tokenizer, vision_config, processor


@family("mistral3", stand_ins="a function of the image processor")
def _mistral3():
    tokenizer, vision_config, processor = _parts(spatial_merge_size=2)
    config = Mistral3Config(
        vision_config=vision_config,
        text_config=text_config("mistral", tokenizer, head_dim=8, sliding_window=None),
        **ids_of(tokenizer, image_token_index="[IMG]"),
        tie_word_embeddings=False,
    )
    return config, processor


@family("pixtral", stand_ins="a function of the image processor")
def _pixtral():
    """Pixtral is a LLaVA with another tower."""
    tokenizer, vision_config, processor = _parts(spatial_merge_size=1)
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config("mistral", tokenizer, head_dim=8, sliding_window=None),
        **ids_of(tokenizer, image_token_id="[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return config, processor

"""Tiny vision-language models of many families and their processors, built in code without downloads.

Each family has a builder in one of the files here, which returns its config, with every scalar as released, and its
processor, with a template written after the released one.
"""

from . import gemma, idefics, llava, mistral, qwen, tiled  # noqa: F401  # they register their families
from .building import CORPUS, TinyVLM, make_image, make_tokenizer, make_vlm, stand_ins


# The four that the whole suite runs on. tests/trainer/families.py runs all.
FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_vl")

__all__ = ["CORPUS", "FAMILIES", "TinyVLM", "make_image", "make_tokenizer", "make_vlm", "stand_ins"]

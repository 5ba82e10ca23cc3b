"""Compares embedding prompts before a model is trained, as VladVA does (section 3.4)."""

from .attention import ImageAttention, image_attention
from .comparison import PromptComparison
from .lists import PROMPTS_FILE, load_prompts
from .statistics import PairRecalls, cumulative_variance, pair_recalls
from .study import compare_prompts
from .summaries import Summaries, summarize


__all__ = [
    "PROMPTS_FILE",
    "ImageAttention",
    "PairRecalls",
    "PromptComparison",
    "Summaries",
    "compare_prompts",
    "cumulative_variance",
    "image_attention",
    "load_prompts",
    "pair_recalls",
    "summarize",
]

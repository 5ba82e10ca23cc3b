"""hf-unigd: vision-language models that retrieve and still speak."""

from .version import __version__

__all__ = ["__version__"]

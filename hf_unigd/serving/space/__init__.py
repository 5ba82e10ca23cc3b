"""A Space of the Hub that serves a model and its page."""

from .writing import write_space


__all__ = ["write_space"]

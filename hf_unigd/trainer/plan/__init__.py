"""What a training run takes: memory, the time of a step, and days, estimated from shapes and a card's data sheet."""

from .cards import CARDS, Card, find_card
from .estimate import Estimate, Workload, estimate
from .shapes import ModelShapes, plan_model


__all__ = ["CARDS", "Card", "Estimate", "ModelShapes", "Workload", "estimate", "find_card", "plan_model"]

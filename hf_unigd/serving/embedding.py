"""Embeds the jobs of a batch."""

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from .batching import Job
from .prepared import Preparer
from .turns import Turns


EMBEDDING = "embedding"


@dataclass(frozen=True)
class Embedded:
    """
    Attributes:
        vector: `torch.FloatTensor` of shape `(d,)` on the CPU: a unit vector.
        tokens: Number of tokens of the sequence with its prompt.
    """

    vector: torch.Tensor
    tokens: int


@dataclass(eq=False)
class EmbeddingJob(Job):
    """
    A sequence to embed.

    Attributes:
        instruction: What it is embedded for.
        dimensions: The size of the Matryoshka prefix, or None for the whole vector.
    """

    instruction: str | None = None
    dimensions: int | None = None

    @property
    def key(self) -> Hashable:
        return self.dimensions


@torch.inference_mode()
def embed_batch(preparer: Preparer, turns: Turns, jobs: list[EmbeddingJob]) -> None:
    """
    Embeds jobs of the same key, and sets their results ([`Embedded`]).

    Args:
        preparer: Makes the batch.
        turns: Says when the model may run.
        jobs: At least one. Those that cannot be processed are told so, and the others go on.
    """
    prepared = preparer.batch(jobs, instructions=[job.instruction for job in jobs])
    if prepared is None:
        return
    model, batch, jobs = preparer.model, prepared.inputs, prepared.jobs
    with turns.turn(EMBEDDING):
        vectors = model.embed(**batch.to(model.device, model.dtype), truncate_dim=jobs[0].dimensions).cpu()
    for job, vector, tokens in zip(jobs, vectors, prepared.lengths, strict=True):
        job.result.set_result(Embedded(vector, tokens))

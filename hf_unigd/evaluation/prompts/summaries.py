"""What a model makes of images and captions at the summary tokens of many prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ...data import RowError
from ...data.example import Messages
from ...data.lengths import length_batches, sequence_length
from ...modeling import SequenceError, UniGDForConditionalGeneration, UniGDProcessor


@dataclass
class Summaries:
    """
    Attributes:
        embeddings (`torch.FloatTensor` of shape `(num_prompts, n, d)`): Unit vectors of `n` images or captions.
        entropies (`torch.FloatTensor` of shape `(num_prompts, n)`): Entropy of the next-token distribution at the
            summary token, in nats (VladVA, section 3.4).
        probabilities (`torch.FloatTensor` of shape `(num_prompts, vocab_size)`): Mean of these distributions.
    """

    embeddings: torch.Tensor
    entropies: torch.Tensor
    probabilities: torch.Tensor

    @classmethod
    def join(cls, blocks: Sequence["Summaries"]) -> "Summaries":
        """The summaries of blocks of images or captions, as those of all of them."""
        total = sum(block.entropies.shape[1] for block in blocks)
        weighted = [block.probabilities * (block.entropies.shape[1] / total) for block in blocks]
        return cls(
            torch.cat([block.embeddings for block in blocks], dim=1),
            torch.cat([block.entropies for block in blocks], dim=1),
            torch.stack(weighted).sum(0),
        )


@torch.no_grad()
def summarize(
    model: UniGDForConditionalGeneration,
    processors: Sequence[UniGDProcessor],
    sequences: Sequence[Messages],
    rows: Sequence[int],
    prompt_name: str,
    batch_size: int = 32,
    on_batch: Callable[[int], object] = lambda count: None,
) -> Summaries:
    """
    Runs images or captions with every prompt. The vision tower runs once for all prompts where the backbone takes its
    output.

    Args:
        model: The model.
        processors: One for each prompt.
        sequences: The images or captions.
        rows: Number of the row of each, for errors.
        prompt_name: Name of the instruction that they begin with, if the processors have it.
        batch_size: Sequences per forward pass.
        on_batch: Is called with the number of sequences whenever all prompts are done with them.

    Raises:
        RowError: a sequence cannot be processed, or is longer than the model's context.
    """
    model.eval()
    order: list[int] = []
    embeddings: list[torch.Tensor] = []
    entropies: list[torch.Tensor] = []
    probabilities: torch.Tensor | None = None
    lengths = [sequence_length(processors[0], sequence) for sequence in sequences]
    for places in length_batches(lengths, batch_size):
        batch = [sequences[place] for place in places]
        found: list[tuple[torch.Tensor, ...]] = []
        features = None
        for processor in processors:
            try:
                inputs = processor.process_sequences(
                    batch, prompt_name=prompt_name, max_length=model.config.context_length
                )
            except SequenceError as error:
                raise RowError(rows[places[error.index]], error.reason) from error
            inputs = dict(inputs.to(model.device, model.dtype))
            if features is None and "pixel_values" in inputs and model.accepts_image_features:
                features = model.image_features(**inputs)
            if features is not None:
                del inputs["pixel_values"]
            embedded, logits = model.embed_and_predict(image_features=features, **inputs)
            distributions = logits.float().softmax(-1)
            found.append((embedded.float(), torch.special.entr(distributions).sum(-1), distributions.sum(0)))
        by_prompt = [torch.stack(each).cpu() for each in zip(*found, strict=True)]
        embeddings.append(by_prompt[0])
        entropies.append(by_prompt[1])
        probabilities = by_prompt[2] if probabilities is None else probabilities + by_prompt[2]
        order += places
        on_batch(len(places))
    back = torch.tensor(order).argsort()
    assert probabilities is not None  # there is at least one sequence
    return Summaries(
        torch.cat(embeddings, dim=1)[:, back], torch.cat(entropies, dim=1)[:, back], probabilities / len(sequences)
    )

"""Explains the alignment kernel on two sequences: how similar they are, and which of their slices it aligns."""

from typing import Any

import torch
from transformers import PreTrainedModel

from ..data import Example, RowError, SentenceSplitter
from ..kernels import ModalityColumns, alignment_kernel, alignment_posterior
from ..modeling import SequenceError, UniGDProcessor


def align_slices(
    x: torch.Tensor,
    y: torch.Tensor,
    x_modalities: torch.Tensor | None = None,
    y_modalities: torch.Tensor | None = None,
    modality_columns: ModalityColumns | None = None,
    bandwidth: float = 1.0,
    normalization: str = "content",
) -> tuple[torch.Tensor, float]:
    r"""
    Aligns two sequences of slices with the kernel of [`StructureLoss`] (Sugar, section 3.2).

    Args:
        x, y (`torch.FloatTensor` of shape `(n, width)` and `(m, width)`): Unit vectors of the slices, or their
            features from [`~hf_unigd.data.Teachers`].
        x_modalities, y_modalities (`torch.LongTensor` of shape `(n,)` and `(m,)`, *optional*): 0 for an image, 1 for
            a text. Needed with `modality_columns`.
        modality_columns: Columns in which slices of two modalities are compared, as
            [`~hf_unigd.data.Teachers.modality_columns`] returns them. By default slices are compared in all columns.
        bandwidth: `δ`; the kernel's bandwidth is `δ · sqrt((n + m) / 2)`.
        normalization: `"cosine"`, or `"content"`, which also removes the part that the two lengths alone explain.

    Returns:
        Two values. The first is the posterior alignment of shape `(n, m)`, float32 (float64 if the inputs are
        float64): for each pair of slices, the probability that an alignment drawn with the kernel's weights aligns
        them. The second is the normalised kernel, limited to 1, as in training.

    Raises:
        ValueError: a sequence is empty, or an argument has another value or shape than described above.
    """
    inputs: dict[str, Any] = {
        "x": x,
        "x_offsets": torch.tensor([0, len(x)]),
        "y": y,
        "y_offsets": torch.tensor([0, len(y)]),
        "x_modalities": x_modalities,
        "y_modalities": y_modalities,
        "modality_columns": modality_columns,
        "bandwidth": bandwidth,
        "per_pair_bandwidth": True,
    }
    (posterior,) = alignment_posterior(**inputs)
    similarity = alignment_kernel(**inputs, normalize=normalization).exp().clamp(max=1.0)
    return posterior, similarity.item()


@torch.no_grad()
def embed_slices(
    model: PreTrainedModel, processor: UniGDProcessor, example: Example, splitter: SentenceSplitter
) -> torch.Tensor:
    """
    Embeds the slices of a sequence and of its target with the model, each in the context of the slices before it.

    Args:
        model: A [`UniGDModel`] or [`UniGDForConditionalGeneration`].
        processor: The processor of the model.
        example: The sequence and its target.
        splitter: Splits texts into sentences. It must be the one that made the example's `slices`.

    Returns:
        Unit vectors, a `torch.FloatTensor` of shape `(len(example.slices), embedding_dim)` on the CPU.

    Raises:
        RowError: the processor cannot process the sequence.
    """
    with_slices = example.anchor_sequences(processor.embedding_position)[0]
    try:
        batch = processor.process_sequences(
            [example.anchor], [with_slices.target], prompted=with_slices.prompted, sentence_ends=splitter
        )
    except SequenceError as error:
        raise RowError(example.row, error.reason) from error
    batch["spans"] = batch.pop("slice_spans")
    return model.eval().embed(**batch.to(model.device, model.dtype)).cpu()

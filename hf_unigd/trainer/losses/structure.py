"""The structure loss: regresses similarities of hidden states onto an alignment kernel of their inputs (Sugar)."""

import torch
from torch import nn

from ...kernels import ModalityColumns, alignment_kernel, mean_slice_similarity, validation
from .gather import gather_rows, own_rows
from .ranges import expand_ranges


class StructureLoss(nn.Module):
    r"""
    The structure-induced loss of Sugar (section 3.2, equation 3):

        L_d = 1/n · sum_i sum_j (m^r_ij - m^l_ij)²

    over `n` positions. A position is the end of a slice (an image or a sentence) of a sequence, and the slices up to
    there are its prefix. `m^r` are the cosine similarities of the model's embeddings at the positions. `m^l` are the
    similarities of the prefixes, computed from the features of frozen teachers: the normalised global alignment kernel
    (equation 2, section 3.2) with bandwidth `δ · sqrt((length_i + length_j) / 2)`, the cosine if both prefixes are one
    slice (theorem 3), and 1 for two positions of one sample. No gradient flows into `m^l`. In training mode, the loss
    covers the positions of all processes with exact gradients, as in [`InfoNCELoss`]. In eval mode, each process uses
    its own.

    The arguments are what the paper leaves open. It also leaves open whether the kernel is normalised; it is
    normalised here, because it exceeds 1 otherwise.

    Args:
        target (`str`, *optional*, defaults to `"kernel"`): `"kernel"`, or `"mean_slice"`, the mean similarity of all
            slices of the two prefixes (table 4b, "w/o GAK").
        normalization (`str`, *optional*, defaults to `"content"`): Normalisation of the kernel: `"cosine"`, or
            `"content"`, which also removes what the two lengths alone explain. The target is clamped to at most 1.
        bandwidth (`float`, *optional*, defaults to 1.0): `δ`, in units of the distance of unit vectors.
        one_slice (`str`, *optional*, defaults to `"cosine"`): Target of two prefixes of one slice: `"cosine"` or
            `"kernel"`.
        similarity (`str`, *optional*, defaults to `"cosine"`): How the model's similarities `m^r` are computed:
            `"cosine"`, or (ours) `"kernel"`, the same kernel over the model's embeddings of all slices of the two
            prefixes. Gradients flow through it.

    Raises:
        ValueError: an argument is not one of its choices.

    Citation: Chow et al., "Unified Generative and Discriminative Training for Multi-modal Large Language Models",
    NeurIPS 2024.
    """

    def __init__(
        self,
        target: str = "kernel",
        normalization: str = "content",
        bandwidth: float = 1.0,
        one_slice: str = "cosine",
        similarity: str = "cosine",
    ):
        super().__init__()
        validation.choice(target, "target", ("kernel", "mean_slice"))
        validation.choice(normalization, "normalization", ("cosine", "content"))
        validation.choice(one_slice, "one_slice", ("cosine", "kernel"))
        validation.choice(similarity, "similarity", ("cosine", "kernel"))
        self.target = target
        self.normalization = normalization
        self.bandwidth = bandwidth
        self.one_slice = one_slice
        self.similarity = similarity

    def forward(
        self,
        embeddings: torch.Tensor,
        features: torch.Tensor,
        modalities: torch.Tensor,
        starts: torch.Tensor,
        lengths: torch.Tensor,
        sample_keys: torch.Tensor,
        modality_columns: ModalityColumns,
    ) -> dict[str, torch.Tensor]:
        r"""
        Args:
            embeddings (`torch.FloatTensor` of shape `(n, d)`): Unit vectors of the positions. With
                `similarity="kernel"`, those of all slices, of shape `(num_slices, d)`.
            features (`torch.FloatTensor` of shape `(num_slices, width)`): Teacher features of all slices, sequence
                after sequence.
            modalities (`torch.LongTensor` of shape `(num_slices,)`): 0 for an image, 1 for a text.
            starts, lengths (`torch.LongTensor` of shape `(n,)`): The prefix of position `i` is
                `features[starts[i] : starts[i] + lengths[i]]`.
            sample_keys (`torch.LongTensor` of shape `(n,)`): Equal for positions of one sample.
            modality_columns: Columns of `features` in which slices of two modalities are compared, as in
                [`~hf_unigd.kernels.alignment_kernel`].

        Returns:
            `dict` of scalars: `loss` and, detached and over pairs of different samples, `alignment_target` and
            `alignment_similarity` (means of `m^l` and `m^r`) and `alignment_correlation` (Pearson's, between them).
        """
        _, slices = expand_ranges(starts, lengths)
        gather = gather_rows if self.training else own_rows
        # Slices are gathered prefix by prefix, because numbers of prefixes and slices differ between processes.
        ends = starts + lengths - 1
        lengths, sample_keys = gather(lengths), gather(sample_keys)
        features = gather(features[slices].to(torch.promote_types(features.dtype, torch.float32)))
        modalities = gather(modalities[slices])
        if len(lengths) == 0:
            zero = embeddings.sum() * 0.0
            return dict.fromkeys(("loss", "alignment_target", "alignment_similarity", "alignment_correlation"), zero)
        same_sample = sample_keys[:, None] == sample_keys[None, :]
        with torch.no_grad():
            target = self._target(features, modalities, lengths, modality_columns)
            target = target.masked_fill(same_sample, 1.0).to(embeddings.dtype)
        if self.similarity == "cosine":
            embeddings = gather(embeddings)
            similarity = embeddings @ embeddings.T
        else:
            similarity = self._kernel(gather(embeddings[slices]), lengths)
            similarity = self._one_slice_cosines(similarity, gather(embeddings[ends]), lengths)
        loss = (similarity - target).square().sum() / len(lengths)
        return {"loss": loss, **self._metrics(similarity.detach(), target, ~same_sample)}

    def _target(self, features, modalities, lengths, modality_columns) -> torch.Tensor:
        packed = {"x_offsets": _offsets(lengths), "x_modalities": modalities, "modality_columns": modality_columns}
        if self.target == "mean_slice":
            return mean_slice_similarity(features, **packed)
        target = self._kernel(features, lengths, x_modalities=modalities, modality_columns=modality_columns).clamp(
            max=1.0
        )
        if self.one_slice == "kernel" or not (single := lengths == 1).any():
            return target
        last = lengths.cumsum(0)[single] - 1
        cosines = mean_slice_similarity(
            features[last],
            x_lengths=None,
            x_offsets=torch.arange(len(last) + 1, device=last.device),
            x_modalities=modalities[last],
            modality_columns=modality_columns,
        )
        return target.masked_scatter(single[:, None] & single[None, :], cosines)

    def _kernel(self, features, lengths, **kwargs) -> torch.Tensor:
        log_kernel = alignment_kernel(
            features,
            _offsets(lengths),
            bandwidth=self.bandwidth,
            per_pair_bandwidth=True,
            normalize=self.normalization,
            **kwargs,
        )
        return log_kernel.exp()

    def _one_slice_cosines(self, similarity, ends, lengths):
        if self.one_slice == "kernel":
            return similarity
        single = lengths == 1
        return torch.where(single[:, None] & single[None, :], ends @ ends.T, similarity)

    @staticmethod
    @torch.no_grad()
    def _metrics(similarity, target, others) -> dict[str, torch.Tensor]:
        if not others.any():
            zero = similarity.new_zeros(())
            return dict.fromkeys(("alignment_target", "alignment_similarity", "alignment_correlation"), zero)
        pairs = torch.stack([similarity[others], target[others]])
        correlation = torch.corrcoef(pairs)[0, 1].nan_to_num()  # undefined if either is constant
        return {
            "alignment_target": pairs[1].mean(),
            "alignment_similarity": pairs[0].mean(),
            "alignment_correlation": correlation,
        }


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])

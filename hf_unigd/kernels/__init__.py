"""Global alignment kernels and soft-DTW for batches of variable-length embedding sequences: torch in, torch out."""

from .functional import ModalityColumns, alignment_kernel, alignment_posterior, mean_slice_similarity, soft_dtw


__all__ = ["ModalityColumns", "alignment_kernel", "alignment_posterior", "mean_slice_similarity", "soft_dtw"]

"""Work over whole datasets: in parts, so that it resumes, and on as many processes as there are."""

from .captioners import LocalCaptioner
from .captioning import caption_dataset
from .embedding import embed_dataset
from .endpoint import EndpointCaptioner
from .processes import on_first_process, process_state
from .slice_features import write_slice_features


__all__ = [
    "EndpointCaptioner",
    "LocalCaptioner",
    "caption_dataset",
    "embed_dataset",
    "on_first_process",
    "process_state",
    "write_slice_features",
]

"""Work over whole datasets: in parts, so that it resumes, and on as many processes as there are."""

from .embedding import embed_dataset
from .processes import process_state


__all__ = ["embed_dataset", "process_state"]

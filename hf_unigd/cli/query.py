"""What the commands that query an index share."""

from dataclasses import dataclass, field
from textwrap import shorten

from ..data.images import open_image
from ..evaluation.figures import draw_retrieval
from ..hub import load_checkpoint
from ..retrieval import EmbeddingIndex, Hit
from .inference import accelerator


@dataclass
class QueryArguments:
    index: str = field(metadata={"help": "Folder that `hf-unigd index` wrote."})
    image: list[str] | None = field(default=None, metadata={"help": "One or more pictures of the query."})
    output: str | None = field(default=None, metadata={"help": "A PNG of the entries found."})
    model: str | None = field(
        default=None, metadata={"help": "Where the index's model is now. By default, where it was."}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "Data type of the backbone.", "choices": ["auto", "bfloat16", "float16", "float32"]},
    )
    faiss_parameters: str | None = field(
        default=None, metadata={"help": "Of an index searched by FAISS, in its own words: nprobe=16, efSearch=64."}
    )

    def load(self):
        """The index, its model and its processor."""
        index = EmbeddingIndex.load(self.index, self.faiss_parameters)
        made = index.description
        revision = {} if self.model else {"revision": made.revision}
        model, processor = load_checkpoint(self.model or made.model, dtype=self.dtype, **revision)
        return index, model.to(accelerator()), processor

    def sequence(self, text: str | None) -> list:
        """Pictures, then the text."""
        return [*(open_image(file) for file in self.image or []), *([text] if text else [])]

    def show(self, hits: list[Hit], title: str) -> None:
        """Prints the entries, and draws them where that was asked for."""
        for place, hit in enumerate(hits, 1):
            print(f"{place:>3}  {hit.score:.3f}  row {hit.row:<8} {shorten(hit.text, 120)}")
        if self.output:
            draw_retrieval([(title, [(hit.image, hit.text, None) for hit in hits])], self.output)
            print(f"Pictures in {self.output}")

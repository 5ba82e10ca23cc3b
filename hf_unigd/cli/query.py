"""Arguments and steps that the commands on an index have in common."""

from dataclasses import dataclass, field
from textwrap import shorten

from ..evaluation.figures import draw_retrieval
from ..hub import load_checkpoint
from ..retrieval import EmbeddingIndex, Hit
from ..retrieval.vectors import PRECISIONS
from .arguments import FigureFile, ImageArguments, accelerator, dtype_field, open_images


@dataclass
class QueryArguments(ImageArguments):
    index: str = field(metadata={"help": "Folder or address that `hf-unigd index` wrote to."})
    image: list[str] | None = field(default=None, metadata={"help": "One or more image files of the query."})
    output: FigureFile | None = field(default=None, metadata={"help": "PNG file to plot the entries found in."})
    model: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of the model that made the index, if it is no longer where it was."},
    )
    dtype: str = dtype_field("Data type to load the backbone in.")
    instruction: str | None = field(
        default=None, metadata={"help": "Instruction of the query, instead of that which the model was saved with."}
    )
    where: str | None = field(
        default=None,
        metadata={"help": "Filter of the entries, a condition of SQL: \"lang = 'de' AND year > 2020\"."},
    )
    precision: str = field(
        default="float32",
        metadata={
            "help": "What the vectors in memory are rounded to. The entries found are scored by the whole vectors.",
            "choices": list(PRECISIONS),
        },
    )

    def load(self):
        """The index, its model and its processor."""
        index = EmbeddingIndex.load(self.index, self.precision)
        made = index.description
        revision = {} if self.model else {"revision": made.revision}
        model, processor = load_checkpoint(self.model or made.model, dtype=self.dtype, **revision)
        return index, model.to(accelerator()), processor

    def sequence(self, text: str | None) -> list:
        """The images of the query, followed by `text`."""
        return [*open_images(self.image, **self.image_settings()), *([text] if text else [])]

    def show(self, hits: list[Hit], title: str) -> None:
        """Prints the entries found, and plots them if `--output` is given."""
        for place, hit in enumerate(hits, 1):
            print(f"{place:>3}  {hit.score:.3f}  {hit.id:<20} {shorten(hit.text, 120)}")
        if self.output:
            draw_retrieval([(title, [(hit.image, hit.text, None) for hit in hits])], self.output)
            print(f"The entries are plotted in {self.output}")

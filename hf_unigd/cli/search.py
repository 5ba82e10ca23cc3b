"""`hf-unigd search`: the rows of an index that are most similar to a text, an image, or both."""

from dataclasses import dataclass, field

from trl import TrlParser

from ..data.images import open_image
from ..evaluation.pictures import draw_retrieval
from ..hub import load_checkpoint
from ..retrieval import EmbeddingIndex, embed_sequences


@dataclass
class SearchArguments:
    index: str = field(metadata={"help": "Folder that `hf-unigd embed` wrote."})
    query: str | None = field(default=None, metadata={"help": "Text to search for."})
    image: str | None = field(default=None, metadata={"help": "Picture to search for."})
    k: int = field(default=5, metadata={"help": "How many rows to show."})
    output: str | None = field(default=None, metadata={"help": "A PNG of the pictures found."})

    def __post_init__(self):
        if self.query is None and self.image is None:
            raise ValueError("Give `--query TEXT`, `--image FILE`, or both.")


def main(argv: list[str]) -> None:
    (args,) = TrlParser((SearchArguments,), prog="hf-unigd search").parse_args_and_config(argv)
    index = EmbeddingIndex.load(args.index)
    model, processor = load_checkpoint(index.model)
    query = [open_image(args.image)] if args.image else []
    if args.query:
        query.append(args.query)
    (hits,) = index.search(embed_sequences(model, processor, [query], show_progress=False), args.k)
    for place, (score, row) in enumerate(hits, 1):
        print(f"{place:>3}  {score:.3f}  row {row['row']:<8} {row['text']}")
    if args.output:
        title = args.query or args.image
        draw_retrieval([(title, [(row["image"], row["text"], None) for _, row in hits])], args.output)
        print(f"Pictures in {args.output}")

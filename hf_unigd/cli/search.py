"""`hf-unigd search`: the entries of an index that are most similar to a text, an image, or both."""

from dataclasses import dataclass, field

from trl import TrlParser

from .query import QueryArguments


@dataclass
class SearchArguments(QueryArguments):
    query: str | None = field(default=None, metadata={"help": "Text to search for."})
    k: int = field(default=5, metadata={"help": "How many entries to show."})

    def __post_init__(self):
        if self.query is None and self.image is None:
            raise ValueError("Give `--query TEXT`, `--image FILE`, or both.")


def main(argv: list[str]) -> None:
    (args,) = TrlParser((SearchArguments,), prog="hf-unigd search").parse_args_and_config(argv)
    index, model, processor = args.load()
    (hits,) = index.search(model, processor, [args.sequence(args.query)], args.k)
    args.show(hits, args.query or " ".join(args.image))

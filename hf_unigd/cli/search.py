"""Search an index for the entries that are most similar to a text, images, or both."""

from dataclasses import dataclass, field

from ..settings import Positive
from .parser import CommandParser
from .query import QueryArguments


@dataclass
class SearchArguments(QueryArguments):
    query: str | None = field(default=None, metadata={"help": "Text to search for."})
    k: Positive = field(default=5, metadata={"help": "Number of entries to show."})

    def __post_init__(self):
        if self.query is None and self.image is None:
            raise ValueError("Give `--query TEXT`, `--image FILE`, or both.")


def main(argv: list[str]) -> None:
    (args,) = CommandParser("search", SearchArguments, description=__doc__).parse(argv)
    index, model, processor = args.load()
    (hits,) = index.search(model, processor, [args.sequence(args.query)], args.k, instruction=args.instruction)
    args.show(hits, args.query or " ".join(args.image))

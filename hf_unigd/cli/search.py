"""Search an index for the entries that are most similar to a text, images, or both."""

from dataclasses import dataclass, field

from ..settings import NotNegative, Positive
from .parser import CommandParser
from .query import QueryArguments


@dataclass
class SearchArguments(QueryArguments):
    query: str | None = field(default=None, metadata={"help": "Text to search for."})
    k: Positive = field(default=5, metadata={"help": "Number of entries to show."})
    offset: NotNegative = field(default=0, metadata={"help": "Number of the best entries to leave out."})
    hybrid: bool = field(
        default=False, metadata={"help": "Rank by the texts too (BM25), and fuse both rankings by reciprocal ranks."}
    )

    def __post_init__(self):
        if self.query is None and self.image is None:
            raise ValueError("Give `--query TEXT`, `--image FILE`, or both.")


def main(argv: list[str]) -> None:
    (args,) = CommandParser("search", SearchArguments, description=__doc__).parse(argv)
    index, model, processor = args.load()
    (hits,) = index.search(
        model,
        processor,
        [args.sequence(args.query)],
        args.k,
        where=args.where,
        offset=args.offset,
        hybrid=args.hybrid,
        instruction=args.instruction,
    )
    args.show(hits, args.query or " ".join(args.image))

"""Answer a question with what an index holds about it. One model retrieves the entries, reads them and answers."""

from dataclasses import dataclass, field

from ..retrieval import answer_with_retrieval
from ..settings import Positive
from .arguments import SamplingArguments
from .parser import CommandParser
from .query import QueryArguments


@dataclass
class AnswerArguments(SamplingArguments, QueryArguments):
    question: str | None = field(default=None, metadata={"help": "Question to answer."})
    k: Positive = field(default=3, metadata={"help": "Number of entries to put into the prompt."})
    use_images: bool = field(default=False, metadata={"help": "Put the images of the entries into the prompt too."})

    def __post_init__(self):
        if self.question is None and self.image is None:
            raise ValueError("Give `--question TEXT`, `--image FILE`, or both.")


def main(argv: list[str]) -> None:
    (args,) = CommandParser("answer", AnswerArguments, description=__doc__).parse(argv)
    index, model, processor = args.load()
    (answer,) = answer_with_retrieval(
        model,
        processor,
        index,
        [args.sequence(args.question)],
        args.k,
        args.use_images,
        where=args.where,
        instruction=args.instruction,
        **args.generate_kwargs(),
    )
    print(answer.text)
    args.show(answer.hits, f"{args.question or ' '.join(args.image)}\n\n{answer.text}")

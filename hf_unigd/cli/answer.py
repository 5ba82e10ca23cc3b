"""`hf-unigd answer`: an answer from what an index knows, found and spoken by one model."""

from dataclasses import dataclass, field

from trl import TrlParser

from ..retrieval import answer_with_retrieval
from .query import QueryArguments


@dataclass
class AnswerArguments(QueryArguments):
    question: str | None = field(default=None, metadata={"help": "What to ask."})
    k: int = field(default=3, metadata={"help": "How many entries to put into the prompt."})
    use_images: bool = field(default=False, metadata={"help": "Put the entries' pictures into the prompt too."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer, in tokens."})
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature; 0 takes the likeliest token."})

    def __post_init__(self):
        if self.question is None and self.image is None:
            raise ValueError("Give `--question TEXT`, `--image FILE`, or both.")


def main(argv: list[str]) -> None:
    (args,) = TrlParser((AnswerArguments,), prog="hf-unigd answer").parse_args_and_config(argv)
    index, model, processor = args.load()
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    (answer,) = answer_with_retrieval(
        model,
        processor,
        index,
        [args.sequence(args.question)],
        args.k,
        args.use_images,
        args.max_new_tokens,
        **sampling,
    )
    print(answer.text)
    args.show(answer.hits, f"{args.question or ' '.join(args.image)}\n\n{answer.text}")

"""`hf-unigd generate`: text from an image, a text, or both."""

from dataclasses import dataclass, field

from trl import TrlParser

from ..data.images import open_image
from ..hub import load_checkpoint
from .inference import InferenceArguments


@dataclass
class GenerateArguments(InferenceArguments):
    image: list[str] | None = field(default=None, metadata={"help": "One or more pictures."})
    prompt: str | None = field(
        default=None, metadata={"help": "What to ask. Without it, the prompt after which captions were trained."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer, in tokens."})
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature; 0 takes the likeliest token."})

    def __post_init__(self):
        if self.image is None and self.prompt is None:
            raise ValueError("Give `--image FILE`, `--prompt TEXT`, or both.")


def main(argv: list[str]) -> None:
    (args,) = TrlParser((GenerateArguments,), prog="hf-unigd generate").parse_args_and_config(argv)
    model, processor = load_checkpoint(args.model, **args.model_kwargs())
    model = model.to(args.device())
    sequence = [open_image(file, args.image_folder) for file in args.image or []]
    if args.prompt:
        sequence.append(args.prompt)
    batch = processor.process_sequences([sequence], prompted=args.prompt is None, padding_side="left")
    batch = batch.to(model.device, model.dtype)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    generated = model.generate(**batch, max_new_tokens=args.max_new_tokens, **sampling)
    answer = generated[0, batch["input_ids"].shape[1] :]
    print(processor.decode(answer, skip_special_tokens=True).strip())

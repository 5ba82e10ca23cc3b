"""Generate text from images, a text, or both."""

from dataclasses import dataclass, field

from ..hub import load_checkpoint
from .arguments import CheckpointArguments, SamplingArguments, accelerator, open_images
from .parser import CommandParser


@dataclass
class GenerateArguments(SamplingArguments, CheckpointArguments):
    image: list[str] | None = field(default=None, metadata={"help": "One or more image files."})
    prompt: str | None = field(
        default=None,
        metadata={"help": "Text after the images. Without it, the prompt that training puts before captions."},
    )

    def __post_init__(self):
        if self.image is None and self.prompt is None:
            raise ValueError("Give `--image FILE`, `--prompt TEXT`, or both.")


def main(argv: list[str]) -> None:
    (args,) = CommandParser("generate", GenerateArguments, description=__doc__).parse(argv)
    model, processor = load_checkpoint(args.model, dtype=args.dtype)
    model = model.to(accelerator())
    sequence = [*open_images(args.image, **args.image_settings()), *([args.prompt] if args.prompt else [])]
    # A caption follows what its image is embedded with, as in training.
    captioned = args.prompt is None
    batch = processor.process_sequences(
        [sequence], prompted=captioned, prompt_name="query" if captioned else None, padding_side="left"
    )
    batch = batch.to(model.device, model.dtype)
    generated = model.generate(**batch, **args.generate_kwargs())
    answer = generated[0, batch["input_ids"].shape[1] :]
    print(processor.decode(answer, skip_special_tokens=True).strip())

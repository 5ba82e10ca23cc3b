"""
Compare prompts on images and their captions, without training: how many words could follow each, how much its
embeddings vary, and what each pair of prompts finds. It draws figures 2 to 6 of VladVA, and names the best pair. Every
prompt is run alone, so that all pairs of 50 image prompts and 50 text prompts take as long as 50 of each. On several
devices: `accelerate launch -m hf_unigd prompts ...`. An interrupted run continues where it stopped when it is started
again.
"""

from dataclasses import dataclass, field

import yaml

from ..bulk import process_state
from ..evaluation.prompts import PromptComparison, compare_prompts, load_prompts
from ..outputs import NewFolder
from ..settings import NotNegative, Positive
from ..trainer import UniGDScriptArguments
from .arguments import CheckpointArguments
from .parser import CommandParser


@dataclass
class PromptsArguments(CheckpointArguments):
    model: str = field(metadata={"help": "Checkpoint, adapter or plain vision-language model: a Hub id or a folder."})
    prompts: str | None = field(
        default=None,
        metadata={"help": "YAML file with the lists `image` and `text`, by default 50 prompts of each that we ship."},
    )
    before: str | None = field(
        default=None,
        metadata={"help": "Model before its training, to compare the tokens and the attention of the best pair with."},
    )
    output: NewFolder = field(default="prompts", metadata={"help": "Folder to write tables and figures to."})
    max_rows: Positive = field(
        default=1000, metadata={"help": "Number of rows to compare on, at equal distances; of a stream, the first."}
    )
    attention_images: NotNegative = field(
        default=4, metadata={"help": "Number of images to draw attention over. 0 leaves the figure out."}
    )
    batch_size: Positive = field(default=32, metadata={"help": "Number of images or captions per forward pass."})
    overwrite: bool = field(default=False, metadata={"help": "Delete what an interrupted run has left."})


def main(argv: list[str]) -> None:
    parser = CommandParser("prompts", PromptsArguments, UniGDScriptArguments, description=__doc__)
    args, script_args = parser.parse(argv)
    prompts = load_prompts(args.prompts)
    comparison = compare_prompts(
        args.model,
        script_args.load_rows(script_args.dataset_test_split),
        args.output,
        before=args.before,
        prompts=prompts,
        dtype=args.dtype,
        max_rows=args.max_rows,
        attention_images=args.attention_images,
        **args.image_settings(),
        batch_size=args.batch_size,
        overwrite=args.overwrite,
    )
    if process_state().is_main_process:
        show(comparison, args.output)


def show(comparison: PromptComparison, output: str) -> None:
    """Prints the best pair of prompts, and what makes training use it."""
    own, best = (0, 0), comparison.best(hand_written=True)
    for title, places in (("The model's own prompts", own), ("The best hand-written prompts", best)):
        recall, entropy = comparison.score(places)
        print(f"\n{title}: mean recall {recall:.1%}, entropy {entropy:.2f} nats")
        for modality, name in comparison.pair(places).items():
            print(f"  {modality}: {name}")
    lines = {f"{modality}_prompt": prompt for modality, prompt in comparison.pair(best).items()}
    print(f"\nTables and figures of all prompts are in {output}.")
    print("To train with the best hand-written ones, write into the YAML file of `hf-unigd train`:\n")
    print(yaml.safe_dump(lines, sort_keys=False, allow_unicode=True, width=1000), end="")

"""
Add the captions that a dataset of images lacks, with any vision-language model or an OpenAI-compatible endpoint, and
write it as Parquet files that train as they are. Images are copied as they are. On several devices: `accelerate launch
-m hf_unigd caption ...`. An interrupted run continues where it stopped when it is started again; a stream is then read
from its beginning, without opening what is captioned already.
"""

from dataclasses import dataclass, field

from ..bulk import EndpointCaptioner, LocalCaptioner, caption_dataset, process_state
from ..bulk.captioners import KINDS
from ..bulk.captioning import check_captionable
from ..outputs import OutputFolder
from ..settings import Positive
from ..trainer import UniGDScriptArguments
from .arguments import ImageArguments, PartArguments, SamplingArguments, dtype_field
from .parser import CommandParser


# BLIP-2 captions VladVA's short captions. Its long ones are from ShareGPT-4V's captioner, which needs code of its own;
# LLaVA-NeXT has learned from ShareGPT-4V's captions.
MODELS = {"short": "Salesforce/blip2-opt-2.7b", "long": "llava-hf/llava-v1.6-mistral-7b-hf"}
# Below the limits of training, 30 and 500, by whichever tokenizer they are counted there.
MAX_NEW_TOKENS = {"short": 24, "long": 400}


@dataclass
class CaptionArguments(SamplingArguments, ImageArguments, PartArguments):
    kind: str = field(
        metadata={"help": "Which captions to add: short_caption or long_caption.", "choices": list(KINDS)},
        kw_only=True,
    )
    output: OutputFolder = field(default="captioned", metadata={"help": "Folder to write, or to continue in."})
    model: str | None = field(
        default=None,
        metadata={
            "help": "Captioner: a Hub id or folder of any image-text-to-text model, or one of our checkpoints or "
            f"adapters. By default {MODELS['short']} for short captions and {MODELS['long']} for long ones. With "
            "`--endpoint`, the name of the model there."
        },
    )
    dtype: str = dtype_field("Data type to load the captioner in.")
    prompt: str | None = field(
        default=None,
        metadata={
            "help": "What the model is asked about an image, or continues if it has no chat template. By default a "
            "question for the kind of caption."
        },
    )
    max_new_tokens: Positive | None = field(  # type: ignore[assignment]  # `__post_init__` sets it
        default=None,
        metadata={
            "help": f"Maximum number of tokens to generate: {MAX_NEW_TOKENS['short']} for short captions by default, "
            f"{MAX_NEW_TOKENS['long']} for long ones."
        },
    )
    endpoint: str | None = field(
        default=None,
        metadata={
            "help": "Address of an OpenAI-compatible endpoint that captions instead, for example "
            "http://localhost:8000/v1. Its key is read from the environment variable OPENAI_API_KEY."
        },
    )
    batch_size: Positive = field(default=32, metadata={"help": "Number of images, or of requests, at once."})
    replace_captions: bool = field(
        default=False, metadata={"help": "Caption the rows that have such a caption, too, and replace it."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete the captions that the folder holds."})

    def __post_init__(self):
        if self.endpoint and not self.model:
            raise ValueError("`--endpoint` needs `--model`, the name of the model there.")
        if self.endpoint and self.dtype != "auto":
            raise ValueError("`--dtype` is for a model that is loaded here. Leave it out with `--endpoint`.")
        self.model = self.model or MODELS[self.kind]
        if self.max_new_tokens is None:
            self.max_new_tokens = MAX_NEW_TOKENS[self.kind]


def main(argv: list[str]) -> None:
    parser = CommandParser("caption", CaptionArguments, UniGDScriptArguments, description=__doc__)
    args, script_args = parser.parse(argv)
    state = process_state()
    rows = script_args.load_rows(script_args.dataset_train_split)
    if rows.column_names is not None:
        check_captionable(rows.column_names, args.kind)
    captioner: LocalCaptioner | EndpointCaptioner
    if args.endpoint:
        captioner = EndpointCaptioner(
            args.endpoint,
            args.model,
            args.kind,
            args.prompt,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            num_requests=args.batch_size,
        )
    else:
        captioner = LocalCaptioner(
            args.model,
            args.kind,
            args.prompt,
            generate_kwargs=args.generate_kwargs(),
            batch_size=args.batch_size,
            dtype=args.dtype,
            device=state.device,
        )
    count = caption_dataset(
        captioner,
        rows,
        args.output,
        args.kind,
        replace_captions=args.replace_captions,
        **args.image_settings(),
        **args.part_settings(),
        overwrite=args.overwrite,
    )
    if state.is_main_process:
        print(f"{count} rows in {args.output}")

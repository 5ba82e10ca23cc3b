"""
Embed a dataset into an index that `hf-unigd search` and `hf-unigd answer` query. Rows that the index has are not
embedded again, so that an interrupted run continues where it stopped, and other rows are added. On several devices:
`accelerate launch -m hf_unigd index ...`. Without a dataset, the command keeps an index in order: `--delete`, `--ann`,
`--optimize` and `--export`.
"""

from dataclasses import dataclass, field
from typing import Annotated

from ..bulk import process_state
from ..hub import load_checkpoint
from ..outputs import OutputFile, WritableOrRemote
from ..retrieval import EmbeddingIndex, build_index
from ..retrieval.entries import is_export
from ..retrieval.table import ANN_TYPES, EntryTable
from ..settings import Positive
from ..trainer import UniGDScriptArguments
from .arguments import ImageArguments, PartArguments, dtype_field
from .parser import CommandParser


ExportFile = Annotated[str, OutputFile(".parquet", is_export)]


@dataclass
class IndexedRowsArguments(UniGDScriptArguments):
    def __post_init__(self):
        if self.dataset_name is not None or self.datasets:
            super().__post_init__()


@dataclass
class IndexArguments(ImageArguments, PartArguments):
    model: str | None = field(
        default=None,
        metadata={
            "help": "Trained checkpoint or adapter: a Hub id or a folder. By default that which made the index."
        },
    )
    dtype: str = dtype_field("Data type to load the backbone in.")
    output: Annotated[str, WritableOrRemote()] = field(
        default="index",
        metadata={"help": "The index: a folder, or an address of an object store such as s3://bucket/index."},
    )
    id_column: str | None = field(
        default=None,
        metadata={"help": "Column of the ids. By default an id is the name of the dataset and the number of the row."},
    )
    metadata_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns of single values to keep, for `search --where`. By default all that belong to no row "
            "format."
        },
    )
    replace: bool = field(
        default=False, metadata={"help": "Embed all rows, which take the places of entries with the same ids."}
    )
    batch_size: Positive = field(default=32, metadata={"help": "Number of rows per forward pass."})
    ann: str = field(
        default="auto",
        metadata={
            "help": "Approximate index of the embeddings. auto makes an IVF_RQ from a million entries on.",
            "choices": ["auto", "none", *ANN_TYPES],
        },
    )
    truncate_dim: Positive | None = field(
        default=None, metadata={"help": "Matryoshka prefix of the embeddings to keep."}
    )
    store_images: bool = field(
        default=True, metadata={"help": "Keep the images, which plots and `hf-unigd answer --use_images` need."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete the entries that the index has first."})
    delete: str | None = field(
        default=None,
        metadata={"help": "Filter of entries to delete, a condition of SQL: \"lang = 'de' AND year > 2020\"."},
    )
    optimize: bool = field(
        default=False,
        metadata={"help": "Join what many small additions left behind, and index it. It also happens by itself."},
    )
    export: ExportFile | None = field(default=None, metadata={"help": "Parquet file to write all entries to."})

    def __post_init__(self):
        if self.overwrite and self.delete:
            raise ValueError("`overwrite` deletes all entries. Leave `delete` out.")


def main(argv: list[str]) -> None:
    parser = CommandParser("index", IndexArguments, IndexedRowsArguments, description=__doc__)
    args, script_args = parser.parse(argv)
    state = process_state()
    has_rows = script_args.dataset_name is not None or bool(script_args.datasets)
    ann = None if args.ann == "none" else args.ann
    if has_rows:
        add_rows(args, script_args, ann, state.device)
    elif not (args.delete or args.optimize or args.export or ann != "auto"):
        raise ValueError(
            "Give a dataset to index (`--dataset_name`), or `--delete`, `--ann`, `--optimize` or `--export`."
        )
    if not state.is_main_process:
        return
    index = EmbeddingIndex.load(args.output)
    if args.delete:
        print(f"{index.delete(where=args.delete)} entries are deleted")
    if not has_rows and ann not in ("auto", index.table.ann):
        index.table.index_embeddings(ann)
    if args.optimize:
        index.table.optimize()
    if args.export:
        index.export(args.export)
        print(f"All entries are in {args.export}")
    print(f"{len(index)} embeddings of width {index.width} in {args.output}")


def add_rows(args: IndexArguments, script_args: UniGDScriptArguments, ann: str | None, device) -> None:
    name, revision = args.model, {}
    if name is None:
        if not EntryTable.exists(args.output):
            raise ValueError(f"`--model` is needed: there is no index in {args.output} yet.")
        made = EmbeddingIndex.load(args.output).description
        name, revision = made.model, {"revision": made.revision}
    model, processor = load_checkpoint(name, dtype=args.dtype, **revision)
    split = script_args.dataset_test_split
    build_index(
        model.to(device),
        processor,
        script_args.load_rows(split),
        args.output,
        model_name=name,
        source="/".join(filter(None, [script_args.dataset_name, script_args.dataset_config, split])),
        id_column=args.id_column,
        metadata_columns=args.metadata_columns,
        replace=args.replace,
        ann=ann,
        truncate_dim=args.truncate_dim,
        store_images=args.store_images,
        **args.image_settings(),
        **args.part_settings(),
        batch_size=args.batch_size,
        overwrite=args.overwrite,
    )

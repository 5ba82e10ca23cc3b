"""The arguments that say which datasets a script or command reads."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

from datasets import Dataset, IterableDataset
from trl import DatasetMixtureConfig, ScriptArguments
from trl.scripts.utils import DatasetConfig as TRLDatasetConfig

from ..data import DatasetMixture, DatasetSource, load_rows
from ..data.dataset import Rows


@dataclass
class DatasetConfig(TRLDatasetConfig):
    r"""
    An entry of `datasets:` in a YAML file: TRL's [`~trl.scripts.utils.DatasetConfig`], and more.

    Args:
        path (`str`):
            What [`~hf_unigd.data.load_rows`] takes: a Hub id, a folder, a file, or the name of a builder of `datasets`
            with `data_files`.
        name, data_dir, data_files, split, columns:
            As in TRL.
        weight (`float`, *optional*):
            How often a row is drawn from this dataset, relative to the others. All datasets have one, or none has. By
            default, each row of map-style datasets is drawn once in each epoch, and streams are drawn equally often.
        rename_columns (`dict[str, str]`, *optional*):
            Columns to rename, from old to new.
        image_folder (`str`, *optional*):
            Folder that the image paths of this dataset start from and must not leave. Defaults to the `image_folder`
            of all datasets.
        instruction, document_instruction (`str`, *optional*):
            What the anchors, and the positives and negatives, of this dataset are embedded for. Training saves them
            with the processor under the names `"PATH/NAME"` and `"PATH/NAME document"`.
        interleaved_captions (`bool`, *optional*, defaults to `False`):
            Whether an image and its `caption` are one sequence, to which there is no answer, as Sugar takes COYO.
        fraction:
            Refused. `weight` says how often rows are drawn, and leaves none out.
    """

    weight: float | None = None
    rename_columns: dict[str, str] | None = None
    image_folder: str | None = None
    instruction: str | None = None
    document_instruction: str | None = None
    interleaved_captions: bool = False

    def __post_init__(self):
        if getattr(self, "fraction", None) is not None:
            raise ValueError(f"{self.path}: `fraction` is not supported. Give all `datasets` a `weight`.")

    def load(self, split: str | None = None, streaming: bool = False) -> DatasetSource:
        """Loads the rows of a split, by default that of the entry."""
        rows = load_rows(
            self.path,
            self.name,
            split or self.split,
            streaming,
            self.rename_columns,
            data_files=self.data_files,
            data_dir=self.data_dir,
        )
        if self.columns:
            rows = rows.select_columns(self.columns)
        names = [each.name for each in fields(DatasetSource) if each.name not in ("rows", "name")]
        return DatasetSource(rows, self.title, **{name: getattr(self, name) for name in names})

    @property
    def title(self) -> str:
        """Names the dataset in errors, metrics and instructions."""
        return self.path if self.name is None else f"{self.path}/{self.name}"


@dataclass
class UniGDScriptArguments(DatasetMixtureConfig, ScriptArguments):
    r"""
    TRL's [`~trl.ScriptArguments`] for one dataset and [`~trl.DatasetMixtureConfig`] for several, plus the columns to
    rename, and the datasets to evaluate.

    Args:
        dataset_name (`str`, *optional*):
            Rows to read: a Hub id, a folder, a file, a pattern of files such as `data/*.tar`, or one of the offline
            sources `icons`, `stories` and `scenes`.
        rename_columns (`list[str]`, *optional*):
            Columns of `dataset_name` to rename, as pairs `old:new`, for example `photo:image title:caption`.
        datasets (`list[DatasetConfig]`, *optional*):
            Datasets to mix, in a YAML file, instead of `dataset_name`. Each is parsed by its own columns.
        eval_datasets (`list[DatasetConfig]`, *optional*):
            Datasets to evaluate, each of its own, with `datasets`. Metrics are named after `path`, and `name` if there
            is one.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to stream `datasets`.
        test_split_size (`float`, *optional*):
            Number or share of the rows of `datasets` to hold out and to evaluate.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Rows to read: a Hub id, a folder, a file, a pattern of files, or the offline sources `icons`, "
            "`stories` and `scenes`."
        },
    )
    rename_columns: list[str] | None = field(
        default=None,
        metadata={"help": "Columns to rename, as pairs old:new, for example `photo:image title:caption`."},
    )
    datasets: list[DatasetConfig] = field(
        default_factory=list, metadata={"help": "Datasets to mix, in a YAML file, instead of `dataset_name`."}
    )
    eval_datasets: list[DatasetConfig] = field(
        default_factory=list, metadata={"help": "Datasets to evaluate, in a YAML file, each of its own."}
    )

    def __post_init__(self):
        self.datasets = [_entry(each, "datasets") for each in self.datasets]
        self.eval_datasets = [_entry(each, "eval_datasets") for each in self.eval_datasets]
        if (self.dataset_name is None) == (not self.datasets):
            raise ValueError(
                "Either `dataset_name` is required (a Hub id, a folder, a file, or `icons`), or `datasets` in a YAML "
                "file."
            )
        if self.dataset_name is not None and (self.eval_datasets or self.test_split_size or self.streaming):
            raise ValueError(
                "`eval_datasets`, `test_split_size` and `streaming` go with `datasets`. With `dataset_name`, use "
                "`dataset_test_split` and `dataset_streaming`."
            )
        if self.eval_datasets and self.test_split_size:
            raise ValueError("Give `eval_datasets` or `test_split_size`, not both.")
        if self.test_split_size and self.streaming:
            raise ValueError("`test_split_size` cannot split streams. Give `eval_datasets`.")
        if self.datasets and self.rename_columns:
            raise ValueError("Give `rename_columns` in the entries of `datasets`.")
        for pair in self.rename_columns or []:
            if len(pair.split(":")) != 2:
                raise ValueError(f"`rename_columns` takes pairs old:new, got {pair!r}.")

    def load_rows(self, split: str) -> Dataset | IterableDataset:
        """
        Loads the rows of a split of `dataset_name` with [`~hf_unigd.data.load_rows`].

        Raises:
            ValueError: there is no `dataset_name`, but `datasets`.
        """
        if self.dataset_name is None:
            raise ValueError("This command reads one dataset. Give `dataset_name` instead of `datasets`.")
        renamed = dict(pair.split(":") for pair in self.rename_columns or [])
        return load_rows(self.dataset_name, self.dataset_config, split, self.dataset_streaming, renamed)

    def load_train_rows(self, seed: int = 42) -> Rows | DatasetMixture:
        """Loads the rows to train on: those of `dataset_name` or of all `datasets`, without those that are held out.
        `seed` decides which are."""
        if self.dataset_name is not None:
            return self.load_rows(self.dataset_train_split)
        return DatasetMixture([self._split(source, seed)[0] for source in self._sources()])

    def load_eval_rows(self, seed: int = 42) -> Rows | DatasetMixture | dict[str, Any]:
        """
        Loads the rows to evaluate: those of `dataset_test_split`, the `eval_datasets` by name, or the rows of
        `datasets` that are held out.

        Raises:
            ValueError: `datasets` are given, and neither `eval_datasets` nor `test_split_size`.
        """
        if self.dataset_name is not None:
            return self.load_rows(self.dataset_test_split)
        if self.eval_datasets:
            return {each.title: DatasetMixture([each.load()]) for each in self.eval_datasets}
        if not self.test_split_size:
            raise ValueError("Evaluation with `datasets` needs `eval_datasets` or `test_split_size`.")
        return DatasetMixture([self._split(source, seed)[1] for source in self._sources()])

    def _sources(self) -> list[DatasetSource]:
        return [each.load(streaming=self.streaming) for each in self.datasets]

    def _split(self, source: DatasetSource, seed: int) -> tuple[DatasetSource, DatasetSource]:
        """The rows to train on, and those that are held out."""
        if not self.test_split_size:
            return source, source
        size: Any = int(self.test_split_size) if self.test_split_size >= 1 else self.test_split_size
        splits = source.rows.train_test_split(size, seed=seed)  # type: ignore[union-attr]  # no stream
        return replace(source, rows=splits["train"]), replace(source, rows=splits["test"])


def _entry(entry: Any, argument: str) -> DatasetConfig:
    if isinstance(entry, DatasetConfig):
        return entry
    known = {each.name for each in fields(DatasetConfig)}
    if not isinstance(entry, dict) or "path" not in entry:
        raise ValueError(f"Each entry of `{argument}` needs a `path`, got {entry!r}.")
    if unknown := sorted(entry.keys() - known):
        raise ValueError(
            f"`{argument}` has an entry with the unknown keys {', '.join(unknown)}. It may have "
            f"{', '.join(sorted(known))}."
        )
    return DatasetConfig(**entry)

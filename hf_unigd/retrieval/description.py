"""What an index was made of: enough to refuse another model, or other rows."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedModel

from ..modeling import UniGDProcessor
from ..outputs import writing
from .probe import probe, probes_differ


DESCRIPTION_FILE = "index.json"


@dataclass
class IndexDescription:
    """
    Attributes:
        model: Hub id or folder of the model.
        revision: Its commit on the Hub; None for a folder, and for an adapter.
        dtype: Data type of its backbone.
        probe: What the model makes of a fixed input.
        truncate_dim: The Matryoshka prefix that was kept; None for all of an embedding.
        store_images: Whether pictures are kept.
        rows: Fingerprint of the dataset.
        num_rows: Its length.
        faiss: FAISS's name of the index that it is searched by; None where the search is exact.
        instruction: The processor's instruction of documents, with which rows without an `instruction` of their own
            were embedded; None if it has none.
    """

    model: str
    revision: str | None
    dtype: str
    probe: list[float]
    truncate_dim: int | None
    store_images: bool
    rows: str
    num_rows: int
    faiss: str | None
    instruction: str | None

    def check_model(self, model: PreTrainedModel, processor: UniGDProcessor) -> None:
        """
        Raises:
            ValueError: the model embeds the probe elsewhere than the one that made the index, or its documents have
                another instruction.
        """
        instruction = processor.get_instruction("document")
        if instruction != self.instruction:
            raise ValueError(
                f"The index was made with the instruction {self.instruction!r} of documents, and the processor has "
                f"{instruction!r}. Use the processor that made the index, or index the rows again "
                "(`hf-unigd index --overwrite true`)."
            )
        if probes_differ(self.probe, probe(model, processor), (self.dtype, dtype_name(model))):
            revision = f" at {self.revision}" if self.revision else ""
            raise ValueError(
                f"The index was made by {self.model}{revision}, and {model.name_or_path or 'this model'} embeds its "
                "probe elsewhere: it is another model, or has been trained since. Use the model that made the index, "
                "or index the rows again (`hf-unigd index --overwrite true`)."
            )

    def check_same(self, made: "IndexDescription") -> None:
        """
        Args:
            made: What the index was begun with.

        Raises:
            ValueError: the index was begun with other rows or settings than these.
        """
        changed = [
            f"`{name}` was {getattr(made, name)!r}, now {getattr(self, name)!r}"
            for name in ("rows", "num_rows", "truncate_dim", "store_images")
            if getattr(made, name) != getattr(self, name)
        ]
        if changed:
            raise ValueError(
                f"The index was begun with other rows or settings: {'; '.join(changed)} (`rows` is the fingerprint of "
                "the dataset). Choose another folder, or start anew with `--overwrite true`."
            )

    def save(self, folder: Path) -> None:
        with writing(folder / DESCRIPTION_FILE) as file:
            file.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "IndexDescription | None":
        """None where the folder holds no index.

        Raises:
            ValueError: its description is damaged.
        """
        file = folder / DESCRIPTION_FILE
        if not file.is_file():
            return None
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file} does not describe an index ({error}). Make one in another folder.") from error


def dtype_name(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")

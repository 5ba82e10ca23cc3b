"""What an index was made with: enough to refuse another model."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from transformers import PreTrainedModel

from ..bulk.probe import probe, probes_differ
from ..modeling import UniGDProcessor


_METADATA = b"hf_unigd"


@dataclass(frozen=True)
class IndexDescription:
    """
    Attributes:
        model: Hub id or folder of the model.
        revision: Its commit on the Hub; None for a folder, and for an adapter.
        dtype: Data type of its backbone.
        probe: What the model makes of a fixed input.
        truncate_dim: The Matryoshka prefix that is kept; None for all of an embedding.
        store_images: Whether images are kept.
        instruction: The processor's instruction of documents, with which rows without an `instruction` of their own
            are embedded; None if it has none.
    """

    model: str
    revision: str | None
    dtype: str
    probe: list[float]
    truncate_dim: int | None
    store_images: bool
    instruction: str | None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        processor: UniGDProcessor,
        model_name: str | None = None,
        truncate_dim: int | None = None,
        store_images: bool = True,
    ) -> "IndexDescription":
        """
        Args:
            model, processor: What embeds the rows.
            model_name: Hub id or folder to load the model from again; that which it was loaded from by default.
            truncate_dim, store_images: As above.
        """
        name = model_name or model.name_or_path
        return cls(
            model=name,
            # A merged adapter bears its base's name and commit, which are not its own.
            revision=getattr(model.config, "_commit_hash", None) if name == model.name_or_path else None,
            dtype=_dtype_name(model),
            probe=probe(model, processor),
            truncate_dim=truncate_dim,
            store_images=store_images,
            instruction=processor.get_instruction("document"),
        )

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
        if probes_differ(self.probe, probe(model, processor), (self.dtype, _dtype_name(model))):
            revision = f" at {self.revision}" if self.revision else ""
            raise ValueError(
                f"The index was made by {self.model}{revision}, and {model.name_or_path or 'this model'} embeds its "
                "probe elsewhere: it is another model, or has been trained since. Use the model that made the index, "
                "or index the rows again (`hf-unigd index --overwrite true`)."
            )

    def check_settings(self, wanted: "IndexDescription") -> None:
        """
        Raises:
            ValueError: the index was made with other settings than are wanted.
        """
        changed = [
            f"`{name}` was {getattr(self, name)!r}, now {getattr(wanted, name)!r}"
            for name in ("truncate_dim", "store_images")
            if getattr(self, name) != getattr(wanted, name)
        ]
        if changed:
            raise ValueError(
                f"The index was made with other settings: {'; '.join(changed)}. Use the same, choose another "
                "`--output`, or start anew with `--overwrite true`."
            )

    def to_metadata(self) -> dict[bytes, bytes]:
        """What the schema of the table keeps."""
        return {_METADATA: json.dumps(asdict(self)).encode()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None, uri: str) -> "IndexDescription":
        """
        Raises:
            ValueError: the metadata of the table at `uri` describes no index.
        """
        try:
            return cls(**json.loads((metadata or {})[_METADATA]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"The table in {uri} does not say which model it was made with ({type(error).__name__}: {error}). It "
                "is no index, or one of another version: make one elsewhere."
            ) from error


def _dtype_name(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")

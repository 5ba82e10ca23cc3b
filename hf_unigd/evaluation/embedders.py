"""Whatever embeds, behind one interface: our checkpoints and adapters, plain vision-language models, and every model
that sentence-transformers loads, CLIP and SigLIP among them."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Protocol, cast

import torch
from accelerate.utils import gather_object
from PIL import Image
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from ..bulk import process_state
from ..bulk.sequences import embed_sequences
from ..data import Example, ExampleCheck
from ..hub.loading import load_checkpoint_or_vlm
from ..inputs import reading
from ..modeling import UniGDConfig, UniGDForConditionalGeneration, UniGDProcessor
from ..modeling.hub_files_unigd import commit_of, find_file, is_adapter
from ..modeling.instructions_unigd import INSTRUCTION, with_instruction


_WINDOW = 16  # batches whose images are open at the same time
_PROBE = "A red star to the left of two blue cars."
_PROBE_LENGTH = 64


class CannotMeasureError(ValueError):
    """Raised where a benchmark asks for what a model does not do."""


class Embedder(Protocol):
    """
    What an evaluation needs of a model.

    Attributes:
        name: Hub id or folder.
        description: What its embeddings depend on, as values that JSON can hold, `name` and the commit among them.
        dtype: Name of the type that it computes in, such as `"bfloat16"`.
    """

    name: str
    description: dict[str, Any]
    dtype: str

    def instruction(self, side: str) -> str | None:
        """The instruction of a `"query"` or a `"document"`, if the model has one."""

    def find_reserved(self, text: str) -> str | None:
        """The token in a text that the model would not read as text."""

    def check(self, example: Example) -> None:
        """
        Raises:
            RowError: the model cannot process the example, which is too long for its context, for instance.
        """

    def embed(self, sequences: Sequence[Any], show_progress: bool = False) -> torch.Tensor:
        """
        Embeds sequences of texts and images, each of which is what
        [`~hf_unigd.UniGDProcessor.process_sequences`] takes.

        Args:
            sequences: The sequences. Each is read once, so that a sequence may open its images when it is read.
            show_progress: Whether to draw a progress bar.

        Returns:
            `torch.FloatTensor` of shape `(len(sequences), d)`, on the CPU: unit vectors.
        """


class ModelEmbedder:
    """
    A UniGD model.

    Args:
        model: The model. It is moved to this process's device.
        processor: Its processor.
        name: Hub id or folder that it was loaded from.
        batch_size: Sequences per forward pass.
        revision: Its commit, if it has one.
    """

    def __init__(
        self,
        model: UniGDForConditionalGeneration,
        processor: UniGDProcessor,
        name: str,
        batch_size: int = 32,
        revision: str | None = None,
    ):
        self.model = model.to(process_state().device).eval()
        self.processor = processor
        self._check = ExampleCheck(processor, model.config.context_length, causal_lm=True, contrastive=True)
        self.name = name
        self.batch_size = batch_size
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.description = {
            "model": name,
            "revision": revision,
            "dtype": self.dtype,
            "prompts": dict(processor.prompts) if processor.embedding_position == "prompt" else None,
            "instructions": dict(processor.instructions),
        }

    def instruction(self, side: str) -> str | None:
        return self.processor.get_instruction(side)

    def find_reserved(self, text: str) -> str | None:
        return self.processor.find_reserved(text)

    def check(self, example: Example) -> None:
        self._check(example)

    def embed(self, sequences: Sequence[Any], show_progress: bool = False) -> torch.Tensor:
        return embed_sequences(
            self.model, self.processor, sequences, self.batch_size, show_progress=show_progress
        ).float()


class SentenceEmbedder:
    """
    A model that sentence-transformers loads. CLIP, SigLIP and their like embed a text or an image; what holds both
    needs a model that takes both in one input.

    Args:
        name: Hub id or folder.
        batch_size: Inputs per forward pass.
        dtype: Name of the type to load it in, or `"auto"`.
        revision: Commit, branch or tag to load.
    """

    def __init__(self, name: str, batch_size: int = 32, dtype: str = "auto", revision: str | None = None):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError(f"{name} needs sentence-transformers: `pip install 'hf-unigd[evaluation]'`.") from error
        self.model = SentenceTransformer(
            name, device=str(process_state().device), revision=revision, model_kwargs={"dtype": dtype}
        )
        self.name = name
        self.batch_size = batch_size
        self.dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        self.description = {
            "model": name,
            "revision": commit_of(name, {"revision": revision}),
            "dtype": self.dtype,
            "prompts": None,
            "instructions": dict(self.model.prompts),
        }
        config = getattr(self.model[0], "config", None)
        # SigLIP was trained on texts that are padded to their full length, and does not mask the padding.
        is_padded = str(getattr(config, "model_type", "")).startswith("siglip")
        self._processing = {"text": {"padding": "max_length", "truncation": True}} if is_padded else None

    def instruction(self, side: str) -> str | None:
        return self.model.prompts.get(side) or None

    def find_reserved(self, text: str) -> str | None:
        return None

    def check(self, example: Example) -> None:
        """Nothing is too long: sentence-transformers truncates."""

    def embed(self, sequences: Sequence[Any], show_progress: bool = False) -> torch.Tensor:
        vectors = []
        window = _WINDOW * self.batch_size
        for start in range(0, len(sequences), window):
            given = [self._input(sequences[place]) for place in range(start, min(start + window, len(sequences)))]
            found: dict[int, torch.Tensor] = {}
            # A call takes inputs of one modality and one instruction.
            order = sorted(range(len(given)), key=lambda place: given[place][0])
            for (_, instruction), group in groupby(order, key=lambda place: given[place][0]):
                places = list(group)
                encoded = self.model.encode(
                    [given[place][1] for place in places],
                    prompt=instruction or None,
                    batch_size=self.batch_size,
                    normalize_embeddings=True,
                    convert_to_tensor=True,
                    show_progress_bar=show_progress,
                    **({"processing_kwargs": self._processing} if self._processing else {}),
                )
                found |= dict(zip(places, encoded.float().cpu(), strict=True))
            vectors += [found[place] for place in range(len(given))]
        return torch.stack(vectors)

    def _input(self, sequence: Any) -> tuple[tuple[str, str], Any]:
        """The modalities and the instruction of a sequence, and the sequence as sentence-transformers takes it."""
        turns = sequence if isinstance(sequence, (list, tuple)) else [sequence]
        if not isinstance(turns[0], dict):
            turns = [{"role": "user", "content": turns}]
        content = [_part(part) for turn in turns for part in turn["content"]]
        instruction = next((part["text"] for part in content if part["type"] == INSTRUCTION), "")
        content = [part for part in content if part["type"] != INSTRUCTION]
        kinds = [part["type"] for part in content]
        if len(turns) == 1 and len(kinds) == len(set(kinds)):  # at most one text and one image
            if not self.model.supports(kinds[0] if len(kinds) == 1 else tuple(sorted(kinds))):
                embedded = ", ".join(map(str, self.model.modalities))
                raise CannotMeasureError(
                    f"{self.name} embeds {embedded}, and not {' and '.join(sorted(kinds))} in one input."
                )
            return ("+".join(sorted(kinds)), instruction), {part["type"]: part[part["type"]] for part in content}
        if "message" not in self.model.modalities:
            raise CannotMeasureError(
                f"{self.name} embeds a text or an image, and not {len(kinds)} parts in one input: "
                f"{', '.join(kinds[:6])}."
            )
        chat = [
            {"role": turn["role"], "content": [part for part in map(_part, turn["content"]) if part in content]}
            for turn in turns
        ]
        return ("message", instruction), chat


def _part(part: Any) -> dict[str, Any]:
    if isinstance(part, dict):
        return {name: part[name] for name in ("type", part["type"] if part["type"] != INSTRUCTION else "text")}
    return {"type": "image", "image": part} if isinstance(part, Image.Image) else {"type": "text", "text": part}


def load_embedder(
    name: str,
    *,
    batch_size: int = 32,
    dtype: str = "auto",
    revision: str | None = None,
    image_prompt: str | None = None,
    text_prompt: str | None = None,
) -> Embedder:
    """
    Loads whatever embeds: a checkpoint or adapter of ours; a plain vision-language model such as
    `llava-hf/llava-1.5-7b-hf`, which is read at the last token of a prompt; or else a model that
    sentence-transformers loads, such as `openai/clip-vit-large-patch14`.

    Args:
        name: Hub id or folder.
        batch_size: Sequences per forward pass.
        dtype: Name of the type to load it in, or `"auto"`.
        revision: Commit, branch or tag to load.
        image_prompt, text_prompt: The prompts of a plain vision-language model; those of VladVA by default.

    Raises:
        ValueError: there is no such model, or a prompt is given for a model that has its own.
    """
    where = {"revision": revision}
    given = {"image": image_prompt, "text": text_prompt}
    prompts = {modality: prompt for modality, prompt in given.items() if prompt is not None}
    kind = kind_of(name, where)
    with reading(name):
        if prompts and kind != "vlm":
            raise ValueError(
                f"{name} has its own way to embed. Leave out {' and '.join(f'`{each}_prompt`' for each in prompts)}, "
                "which are for plain vision-language models."
            )
        if kind == "sentence":
            return SentenceEmbedder(name, batch_size, dtype, revision)
        model, processor = load_checkpoint_or_vlm(name, prompts, dtype=dtype, revision=revision)
    return ModelEmbedder(model, processor, name, batch_size, commit_of(name, where))


def kind_of(name: str, where: Mapping[str, Any]) -> str:
    """
    What kind of model a name is: `"checkpoint"` (ours, or an adapter), `"vlm"` or `"sentence"`. Only its configuration
    is read.

    Args:
        name: Hub id or folder.
        where: Arguments of a `from_pretrained` that say where to load from, such as `revision`.

    Raises:
        ValueError: there is no such model, or its configuration is damaged.
    """
    with reading(name):
        return _kind_of(name, dict(where))


def _kind_of(name: str, where: dict[str, Any]) -> str:
    try:
        if is_adapter(name, where):
            return "checkpoint"
    except OSError as error:
        raise ValueError(f"{name} is neither a folder nor a Hub id of a model that can be reached.") from error
    config = PreTrainedConfig.get_config_dict(name, **where)[0] if find_file(name, "config.json", where) else {}
    model_type = config.get("model_type")
    if model_type == UniGDConfig.model_type:
        return "checkpoint"
    if find_file(name, "modules.json", where):
        return "sentence"
    if not config:
        raise ValueError(f"{name} is neither a folder nor a Hub id of a model that can be reached.")
    return "vlm" if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES else "sentence"


def probe_of(embedder: Embedder) -> list[float]:
    """The first numbers of the embedding of a fixed text, by which a model in a folder is recognised."""
    return embedder.embed([_PROBE])[0, :_PROBE_LENGTH].tolist()


class Instructed(Sequence):
    """
    Sequences with the instruction of a side of retrieval, each made when it is read.

    Args:
        sequences: The sequences.
        instruction: The instruction, if there is one.
    """

    def __init__(self, sequences: Sequence[Any], instruction: str | None):
        self.sequences, self.instruction = sequences, instruction

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, place):
        return with_instruction(self.sequences[place], self.instruction)


class _Share(Sequence):
    """Every `step`-th of some sequences, from the place `first` on."""

    def __init__(self, sequences: Sequence[Any], first: int, step: int):
        self.sequences, self.places = sequences, range(first, len(sequences), step)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place):
        return self.sequences[self.places[place]]


def embed_on_processes(embedder: Embedder, sequences: Sequence[Any], show_progress: bool = False) -> torch.Tensor:
    """
    Embeds sequences on all processes that a launcher started, each its share. All processes call it with the same
    sequences, and all receive all embeddings.

    Args:
        embedder: Embeds them.
        sequences: The sequences, as in [`Embedder.embed`].
        show_progress: Whether the first process draws a progress bar.

    Returns:
        `torch.FloatTensor` of shape `(len(sequences), d)`, on the CPU.

    Raises:
        ValueError: there are no sequences.
    """
    if len(sequences) == 0:
        raise ValueError("There is nothing to embed.")
    state = process_state()
    share = _Share(sequences, state.process_index, state.num_processes)
    own = embedder.embed(share, show_progress and state.is_main_process) if len(share) else None
    if state.num_processes == 1:
        return cast(torch.Tensor, own)
    shares = gather_object([own])
    vectors = torch.empty(len(sequences), shares[0].shape[1])
    for process, vectors_of_share in enumerate(shares):
        if vectors_of_share is not None:
            vectors[process :: state.num_processes] = vectors_of_share
    return vectors

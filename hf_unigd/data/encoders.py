"""A frozen encoder of images, of texts, or of both, and what makes its inputs, which workers run beside it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, PretrainedConfig
from transformers.utils import cached_file

from ..inputs import reading
from ..modeling.hub_files_unigd import commit_of


BATCH_SIZE = 64  # images or texts per forward pass


@dataclass(frozen=True)
class EncoderInputs:
    """
    What an encoder makes vectors of.

    Attributes:
        inputs: Arguments of the model's forward pass, or the images or texts for a sentence-transformers model, which
            processes them itself.
        of_texts: Whether they are texts.
        truncated: Number of texts that were truncated.
    """

    inputs: Any
    of_texts: bool
    truncated: int = 0


@dataclass
class Preprocessor:
    """
    Makes the inputs of an encoder. It holds no weights, so that workers can have it.

    Attributes:
        name: Hub id or folder of the encoder.
        config: Config of the encoder; None for a sentence-transformers model.
    """

    name: str
    config: PretrainedConfig | None

    def __call__(self, contents: Sequence[Image.Image | str]) -> list[EncoderInputs]:
        """
        Processes images or texts, but not both at once, for forward passes of at most `BATCH_SIZE`. A text longer than
        the encoder's limit is truncated by the encoder's own tokenizer.

        Args:
            contents: At least one image, or at least one text.

        Raises:
            ValueError: the encoder does not take this modality.
        """
        batches = [contents[start : start + BATCH_SIZE] for start in range(0, len(contents), BATCH_SIZE)]
        return [self._process(batch) for batch in batches]

    def _process(self, contents):
        of_texts = isinstance(contents[0], str)
        if self.config is None:
            return EncoderInputs(list(contents), of_texts)
        if not of_texts:
            return EncoderInputs(dict(self._image_processor(images=list(contents), return_tensors="pt")), False)
        max_length = min(self._tokenizer.model_max_length, self.config.get_text_config().max_position_embeddings)
        # SigLIP pools the last position, and was trained on texts that are padded to the limit.
        padding = "max_length" if self.config.model_type.startswith("siglip") else True
        inputs = self._tokenizer(
            list(contents), padding=padding, truncation=True, max_length=max_length, return_tensors="pt"
        )
        return EncoderInputs(dict(inputs), True, _count_truncated(self._tokenizer, contents, max_length))

    @cached_property
    def _tokenizer(self):
        with reading(self.name):
            return AutoTokenizer.from_pretrained(self.name)

    @cached_property
    def _image_processor(self):
        with reading(self.name):
            return AutoImageProcessor.from_pretrained(self.name)


class Encoder:
    """A frozen encoder that turns images or texts into unit vectors.

    Args:
        name: Hub id or folder of a sentence-transformers model (one with a `modules.json`), or of any other model that
            `AutoModel` loads.
        pooling: `"cls"` or `"mean"`: the pooling of a model that has neither `modules.json` nor projected features.
        device: Device that the encoder runs on.

    Attributes:
        preprocess: Makes the inputs of `encode`.
        truncated: Number of texts that have been truncated so far.

    Raises:
        ImportError: `name` is a sentence-transformers model, and the library is not installed.
    """

    def __init__(self, name: str, pooling: str = "cls", device: torch.device | str = "cpu"):
        self.name = name
        self.pooling = pooling
        self.device = torch.device(device)
        self.truncated = 0
        self.model: Any
        self.is_sentence_transformer = _has_file(name, "modules.json")
        with reading(name):
            self.model = self._load().to(device).eval()
        self.model.requires_grad_(False)
        self.preprocess = Preprocessor(name, None if self.is_sentence_transformer else self.model.config)

    def _load(self):
        if not self.is_sentence_transformer:
            return AutoModel.from_pretrained(self.name)
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError(
                f"{self.name} needs sentence-transformers: `pip install 'hf-unigd[teachers]'`."
            ) from error
        return SentenceTransformer(self.name, device=str(self.device))

    def __call__(self, contents: Sequence[Image.Image | str]) -> torch.Tensor:
        """Encodes images or texts, but not both at once, as [`Preprocessor`] and `encode` do one after the other.

        Args:
            contents: At least one image, or at least one text.

        Returns:
            Unit vectors of shape `(n, dim)`, float32, on the encoder's device.

        Raises:
            ValueError: the encoder does not take this modality.
        """
        return self.encode(self.preprocess(contents))

    @torch.no_grad()
    def encode(self, batches: Sequence[EncoderInputs]) -> torch.Tensor:
        """Encodes what `preprocess` made, and counts truncated texts in `truncated`.

        Returns:
            Unit vectors of shape `(n, dim)`, float32, on the encoder's device.
        """
        return torch.cat([F.normalize(self._encode(batch).float(), dim=-1) for batch in batches])

    def _encode(self, batch):
        self.truncated += batch.truncated
        if self.is_sentence_transformer:
            contents = batch.inputs
            if batch.of_texts:
                self.truncated += _count_truncated(self.model.tokenizer, contents, self.model.max_seq_length)
            return self.model.encode(
                contents, batch_size=len(contents), convert_to_tensor=True, show_progress_bar=False
            )
        inputs = {name: tensor.to(self.device) for name, tensor in batch.inputs.items()}
        get_features = getattr(self.model, "get_text_features" if batch.of_texts else "get_image_features", None)
        if get_features is not None:
            return _features(get_features(**inputs))
        hidden = self.model(**inputs).last_hidden_state
        if batch.of_texts:
            return self._pool(hidden, inputs["attention_mask"])
        return self._pool(hidden, torch.ones(hidden.shape[:2], device=hidden.device))

    def _pool(self, hidden, mask):
        if self.pooling == "cls":
            return hidden[:, 0]
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def encoder_commit(name: str) -> str:
    """Identifies the version of an encoder: the commit of a Hub id, or a digest of the files of a local folder.

    The string is empty if the commit of a Hub id cannot be determined.
    """
    if not Path(name).is_dir():
        return commit_of(name, {}) or ""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(Path(name).rglob("*")):
        if file.suffix in (".json", ".safetensors", ".bin", ".txt", ".model"):
            digest.update(str(file.relative_to(name)).encode())
            with file.open("rb") as stream:
                while part := stream.read(1 << 24):
                    digest.update(part)
    return digest.hexdigest()


def _has_file(name: str, file: str) -> bool:
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False) is not None


def _count_truncated(tokenizer, texts: Sequence[str], max_length: int) -> int:
    lengths = map(len, tokenizer(list(texts), verbose=False)["input_ids"])
    return sum(length > max_length for length in lengths)


def _features(outputs) -> torch.Tensor:
    """Returns the projected features. Depending on the model, they are the output itself or its `pooler_output`."""
    return outputs if isinstance(outputs, torch.Tensor) else outputs.pooler_output

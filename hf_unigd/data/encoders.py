"""A frozen encoder of images, of texts, or of both."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.utils import cached_file

from ..inputs import reading
from ..modeling.hub_files_unigd import commit_of


BATCH_SIZE = 64  # images or texts per forward pass


class Encoder:
    """A frozen encoder that turns images or texts into unit vectors.

    Args:
        name: Hub id or folder of a sentence-transformers model (one with a `modules.json`), or of any other model that
            `AutoModel` loads.
        pooling: `"cls"` or `"mean"`: the pooling of a model that has neither `modules.json` nor projected features.
        device: Device that the encoder runs on.

    Attributes:
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

    @torch.no_grad()
    def __call__(self, contents: Sequence[Image.Image | str]) -> torch.Tensor:
        """Encodes images or texts, but not both at once.

        A text longer than the encoder's limit is truncated by the encoder's own tokenizer and counted in `truncated`.

        Args:
            contents: At least one image, or at least one text.

        Returns:
            Unit vectors of shape `(n, dim)`, float32, on the encoder's device.

        Raises:
            ValueError: the encoder does not take this modality.
        """
        parts = [contents[start : start + BATCH_SIZE] for start in range(0, len(contents), BATCH_SIZE)]
        return torch.cat([self._encode(part) for part in parts])

    def _encode(self, contents):
        of_texts = isinstance(contents[0], str)
        if self.is_sentence_transformer:
            if of_texts:
                self._count_truncated(self.model.tokenizer, contents, self.model.max_seq_length)
            vectors = self.model.encode(
                list(contents), batch_size=len(contents), convert_to_tensor=True, show_progress_bar=False
            )
        else:
            vectors = self._encode_texts(contents) if of_texts else self._encode_images(contents)
        return F.normalize(vectors.float(), dim=-1)

    def _encode_texts(self, texts):
        max_length = min(self._tokenizer.model_max_length, self.model.config.get_text_config().max_position_embeddings)
        self._count_truncated(self._tokenizer, texts, max_length)
        # SigLIP pools the last position, and was trained on texts that are padded to the limit.
        padding = "max_length" if self.model.config.model_type.startswith("siglip") else True
        inputs = self._tokenizer(
            list(texts), padding=padding, truncation=True, max_length=max_length, return_tensors="pt"
        ).to(self.device)
        if hasattr(self.model, "get_text_features"):
            return _features(self.model.get_text_features(**inputs))
        return self._pool(self.model(**inputs).last_hidden_state, inputs["attention_mask"])

    def _encode_images(self, images):
        inputs = self._image_processor(images=list(images), return_tensors="pt").to(self.device)
        if hasattr(self.model, "get_image_features"):
            return _features(self.model.get_image_features(**inputs))
        hidden = self.model(**inputs).last_hidden_state
        return self._pool(hidden, torch.ones(hidden.shape[:2], device=hidden.device))

    def _pool(self, hidden, mask):
        if self.pooling == "cls":
            return hidden[:, 0]
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def _count_truncated(self, tokenizer, texts, max_length):
        lengths = map(len, tokenizer(list(texts), verbose=False)["input_ids"])
        self.truncated += sum(length > max_length for length in lengths)

    @cached_property
    def _tokenizer(self):
        with reading(self.name):
            return AutoTokenizer.from_pretrained(self.name)

    @cached_property
    def _image_processor(self):
        with reading(self.name):
            return AutoImageProcessor.from_pretrained(self.name)


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


def _features(outputs) -> torch.Tensor:
    """Returns the projected features. Depending on the model, they are the output itself or its `pooler_output`."""
    return outputs if isinstance(outputs, torch.Tensor) else outputs.pooler_output

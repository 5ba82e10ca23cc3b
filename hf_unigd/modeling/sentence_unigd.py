"""The module by which `SentenceTransformer(id, trust_remote_code=True)` embeds exactly like the model itself.

It is saved with every checkpoint and named in its `modules.json`. Only sentence-transformers loads it.
"""

from typing import Any

import torch
from PIL import Image
from sentence_transformers.base.modality import is_image_url_or_path, is_message_dict
from sentence_transformers.base.modules import InputModule

from .images_unigd import ImageError, open_image
from .modeling_unigd import UniGDModel
from .processing_unigd import SequenceError, UniGDProcessor


class UniGDSentenceModule(InputModule):
    """
    Embeds texts, PIL images, paths of images, `{"text": ..., "image": ...}` dicts, chats, and lists of texts and
    images in any order.

    A bare string is an image if it is a path with the suffix of an image format, as everywhere in
    sentence-transformers, and a text otherwise. In a dict, the name of the modality says what a string is. An input
    with more tokens than `max_seq_length` is refused; nothing is truncated.

    Args:
        model ([`UniGDModel`]): The model.
        processor ([`UniGDProcessor`]): Its processor.
    """

    save_in_root = True
    config_keys: list[str] = []  # noqa: RUF012

    def __init__(self, model: UniGDModel, processor: UniGDProcessor):
        super().__init__()
        self.model = model
        self.model.processor = processor
        self.processor = processor
        self.tokenizer = processor.tokenizer
        # `SentenceTransformer.max_seq_length` reads and sets it.
        self.max_seq_length = model.config.context_length

    @property
    def modalities(self):
        return ["text", "image", "message"]

    def preprocess(self, inputs, prompt: str | None = None, **kwargs) -> dict[str, Any]:
        """Makes the model's inputs. A `prompt` is the instruction of each input.

        Raises:
            ValueError: an input is of another kind than the accepted ones, has too many tokens, or is the URL of an
                image, which is not fetched.
        """
        sequences = [_to_sequence(value) for value in inputs]
        instruction = prompt or None  # sentence-transformers has an empty one where there is none
        try:
            return dict(
                self.processor.process_sequences(sequences, instruction=instruction, max_length=self.max_seq_length)
            )
        except SequenceError as error:
            # `encode` sorts its inputs, so that their places here are not the caller's.
            raise ValueError(f"The input {_excerpt(inputs[error.index])} {error.reason}") from error

    def forward(self, features: dict[str, Any], **kwargs) -> dict[str, Any]:
        inputs = {
            name: value.to(self.model.dtype) if value.is_floating_point() else value
            for name, value in features.items()
            if isinstance(value, torch.Tensor)
        }
        return {**features, "sentence_embedding": self.model.embed(**inputs)}

    def get_embedding_dimension(self) -> int:
        return self.model.config.embedding_dim

    get_sentence_embedding_dimension = get_embedding_dimension

    def save(self, output_path: str, *args, **kwargs) -> None:
        self.model.save_pretrained(output_path)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token=None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        **kwargs,
    ):
        where = {
            "token": token,
            "cache_dir": cache_folder,
            "revision": revision or "main",
            "local_files_only": local_files_only,
            "trust_remote_code": trust_remote_code,
        }
        model = UniGDModel.from_pretrained(model_name_or_path, **where, **(model_kwargs or {}))
        processor = UniGDProcessor.from_pretrained(model_name_or_path, **where, **(processor_kwargs or {}))
        return cls(model, processor)


def _to_sequence(value: Any) -> Any:
    """An input of sentence-transformers as [`UniGDProcessor.process_sequences`] takes it."""
    if is_message_dict(value):
        value = [value]
    if isinstance(value, (list, tuple)) and value and is_message_dict(value[0]):
        return [{**turn, "content": _parts(turn["content"])} for turn in value]
    return _parts(value)


def _parts(value: Any) -> list:
    if isinstance(value, str):
        return [_to_image(value) if is_image_url_or_path(value) else value]
    if isinstance(value, Image.Image):
        return [_to_image(value)]
    if isinstance(value, dict):
        if "type" in value:  # a part of a message
            value = {value["type"]: value.get(value["type"])}
        unknown = set(value) - {"text", "image"}
        if unknown or not value:
            raise ValueError(f"An input has the modalities {sorted(unknown)}; only 'text' and 'image' are accepted.")
        return [part for modality, each in value.items() for part in _of_modality(modality, each)]
    if isinstance(value, (list, tuple)):
        return [part for each in value for part in _parts(each)]
    raise ValueError(
        f"An input is a {type(value).__name__}; texts, PIL images, paths, dicts, lists and chats are accepted."
    )


def _of_modality(modality: str, value: Any) -> list:
    """The texts or images under the name of their modality, which says what a string is."""
    if isinstance(value, (list, tuple)):
        return [part for each in value for part in _of_modality(modality, each)]
    if modality == "image":
        return [_to_image(value)]
    if not isinstance(value, str):
        raise ValueError(f"An input has a {type(value).__name__} as its 'text'; a string is needed.")
    return [value]


def _to_image(value: Any) -> Image.Image:
    if isinstance(value, str) and value.startswith(("http://", "https://", "data:")):
        raise ValueError(f"{value[:80]} is not fetched: open the image and pass a PIL image.")
    if not isinstance(value, (str, Image.Image)):
        raise ValueError(f"An input has a {type(value).__name__} as its 'image'; a PIL image or a path is needed.")
    try:
        return open_image(value)
    except ImageError as error:
        raise ValueError(f"An input {error}") from error


def _excerpt(value: Any) -> str:
    """An input, shortened, for an error."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

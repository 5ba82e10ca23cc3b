"""The frozen encoders of the Triple Kernel (Sugar, section 3.3) and what they see of slices."""

from dataclasses import dataclass, field
from importlib.metadata import version

import torch
from PIL import Image

from .encoders import Encoder, encoder_commit
from .example import IMAGE, TEXT, Slice
from .slices import SentenceSplitter


@dataclass
class TeacherArguments:
    r"""
    Which frozen encoders compare slices. The defaults are Sugar's.

    Args:
        image_teacher (`str`, *optional*, defaults to `"facebook/dinov2-base"`):
            Compares images: a Hub id or folder of any `AutoModel` or sentence-transformers model.
        text_teacher (`str`, *optional*, defaults to `"BAAI/bge-base-en-v1.5"`):
            Compares sentences.
        cross_teacher (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Compares images with sentences: a model with an image and a text encoder.
        teacher_pooling (`str`, *optional*, defaults to `"cls"`):
            What an `AutoModel` without pooling of its own gives: its first token (`"cls"`) or the `"mean"` of all. The
            paper names neither; DINOv2 and BGE are trained with the first.
        sentence_language (`str`, *optional*, defaults to `"en"`):
            Language by whose rules texts are cut into sentences.
    """

    image_teacher: str = field(
        default="facebook/dinov2-base",
        metadata={"help": "Encoder that compares images: any `AutoModel` or sentence-transformers id or folder."},
    )
    text_teacher: str = field(default="BAAI/bge-base-en-v1.5", metadata={"help": "Encoder that compares sentences."})
    cross_teacher: str = field(
        default="openai/clip-vit-large-patch14", metadata={"help": "Encoder that compares images with sentences."}
    )
    teacher_pooling: str = field(
        default="cls",
        metadata={"help": "Pooling of an `AutoModel` that has none of its own.", "choices": ["cls", "mean"]},
    )
    sentence_language: str = field(default="en", metadata={"help": "Language of the sentence splitter."})

    @property
    def splitter(self) -> SentenceSplitter:
        return SentenceSplitter(self.sentence_language)

    def fingerprint(self) -> dict[str, str]:
        """All that slice features depend on, with the commits of Hub ids and a digest of local folders."""
        names = TeacherArguments.__dataclass_fields__
        commits = {
            f"{name}_commit": encoder_commit(getattr(self, name)) for name in names if name.endswith("_teacher")
        }
        return {
            **{name: getattr(self, name) for name in names},
            **commits,
            "splitter": f"sentencex {version('sentencex')}",
        }


class Teachers:
    """The three encoders of the Triple Kernel.

    A slice's features are two unit vectors side by side: what it is compared with its own modality by (DINOv2's of an
    image, BGE's of a sentence, in the same columns) and with the other (CLIP's), as in the paper's equation 4.

    Args:
        args: Which encoders.
        device: Where they run.
    """

    def __init__(self, args: TeacherArguments, device: torch.device | str = "cpu"):
        names = {args.image_teacher, args.text_teacher, args.cross_teacher}
        encoders = {name: Encoder(name, args.teacher_pooling, device) for name in names}
        self.encoders = list(encoders.values())
        self.own = {IMAGE: encoders[args.image_teacher], TEXT: encoders[args.text_teacher]}
        self.cross = encoders[args.cross_teacher]
        images, texts = [Image.new("RGB", (32, 32))], ["a"]
        self.own_width = max(self.own[IMAGE](images).shape[1], self.own[TEXT](texts).shape[1])
        self.cross_width = self.cross(texts).shape[1]
        if self.cross(images).shape[1] != self.cross_width:
            raise ValueError(f"`cross_teacher` {args.cross_teacher} embeds images and texts in different spaces.")

    def modality_columns(self, triple_kernel: bool = True) -> dict[tuple[int, int], tuple[int, int]]:
        return slice_columns(self.own_width, self.cross_width, triple_kernel)

    @property
    def truncated(self) -> int:
        """Texts that an encoder has cut so far."""
        return sum(encoder.truncated for encoder in self.encoders)

    def __call__(self, slices: list[Slice]) -> torch.Tensor:
        """Features `(n, own_width + cross_width)` of slices, float32; equal ones are encoded once."""
        keys = [part.key for part in slices]
        distinct = dict(zip(keys, slices, strict=True))
        places = {key: place for place, key in enumerate(distinct)}
        features = torch.zeros(len(distinct), self.own_width + self.cross_width, device=self.cross.device)
        for modality, own in self.own.items():
            chosen = [key for key, part in distinct.items() if part.modality == modality]
            if chosen:
                contents = [distinct[key].content for key in chosen]
                rows = torch.tensor([places[key] for key in chosen], device=features.device)
                vectors = own(contents)
                features[rows, : vectors.shape[1]] = vectors
                features[rows, self.own_width :] = self.cross(contents)
        return features[torch.tensor([places[key] for key in keys], device=features.device)]


def slice_columns(
    own_width: int, cross_width: int, triple_kernel: bool = True
) -> dict[tuple[int, int], tuple[int, int]]:
    """In which columns slices are compared: the Triple Kernel's, or the cross-modal ones always ("w/o TK")."""
    cross = (own_width, own_width + cross_width)
    own = (0, own_width) if triple_kernel else cross
    return {(IMAGE, IMAGE): own, (TEXT, TEXT): own, (IMAGE, TEXT): cross}

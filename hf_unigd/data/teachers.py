"""The frozen encoders of the Triple Kernel (Sugar, section 3.3) and the features that they give slices."""

from dataclasses import dataclass, field, fields
from importlib.metadata import version

import torch
from PIL import Image

from .encoders import Encoder, EncoderInputs, Preprocessor, encoder_commit
from .example import IMAGE, TEXT, Slice
from .slices import SentenceSplitter


@dataclass
class TeacherArguments:
    r"""
    The frozen encoders that compare slices. The defaults are Sugar's.

    Args:
        image_teacher (`str`, *optional*, defaults to `"facebook/dinov2-base"`):
            Encoder that compares images with images: a Hub id or folder of any `AutoModel` or sentence-transformers
            model.
        text_teacher (`str`, *optional*, defaults to `"BAAI/bge-base-en-v1.5"`):
            Encoder that compares sentences with sentences: a model of the same kinds.
        cross_teacher (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Encoder that compares images with sentences: a model with an image encoder and a text encoder.
        teacher_pooling (`str`, *optional*, defaults to `"cls"`):
            Pooling of an `AutoModel` that has none of its own: its first token (`"cls"`) or the `"mean"` of all
            tokens. The paper names neither; DINOv2 and BGE are trained with the first token.
        sentence_language (`str`, *optional*, defaults to `"en"`):
            Language whose rules split texts into sentences.
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
        """Returns everything that slice features depend on.

        This is every argument, the version of every encoder (the commit of a Hub id, or a digest of a local folder),
        and the version of the sentence splitter.
        """
        names = [argument.name for argument in fields(TeacherArguments)]
        commits = {
            f"{name}_commit": encoder_commit(getattr(self, name)) for name in names if name.endswith("_teacher")
        }
        return {
            **{name: getattr(self, name) for name in names},
            **commits,
            "splitter": f"sentencex {version('sentencex')}",
        }


@dataclass(frozen=True)
class TeacherInputs:
    """
    What the teachers make features of.

    Attributes:
        count: Number of slices.
        places: By modality, which of the slices have it. A modality without a slice is left out, here and below.
        own: By modality, the inputs of its own teacher.
        cross: By modality, the inputs of the teacher of both.
    """

    count: int
    places: dict[int, list[int]]
    own: dict[int, list[EncoderInputs]]
    cross: dict[int, list[EncoderInputs]]


@dataclass
class TeacherPreprocessor:
    """
    Makes the inputs of the teachers. It holds no weights, so that workers can have it.

    Attributes:
        own: By modality, what makes the inputs of its own teacher.
        cross: What makes the inputs of the teacher of both.
    """

    own: dict[int, Preprocessor]
    cross: Preprocessor

    def __call__(self, slices: list[Slice]) -> TeacherInputs:
        """Processes slices, each by itself, even if some are equal."""
        places = {modality: [n for n, one in enumerate(slices) if one.modality == modality] for modality in self.own}
        contents = {modality: [slices[place].content for place in own] for modality, own in places.items() if own}
        return TeacherInputs(
            len(slices),
            {modality: places[modality] for modality in contents},
            {modality: self.own[modality](own) for modality, own in contents.items()},
            {modality: self.cross(own) for modality, own in contents.items()},
        )


class Teachers:
    """The three encoders of the Triple Kernel.

    The features of a slice are two unit vectors side by side. The first compares it with slices of its own modality:
    it is DINOv2's vector of an image or BGE's vector of a sentence, in the same columns, padded with zeros to
    `own_width`. The second, CLIP's vector, compares it with slices of the other modality (equation 4 of the paper).

    Args:
        args: The encoders.
        device: Device that the encoders run on.

    Attributes:
        preprocess: Makes the inputs of `encode`.
        own_width, cross_width: Widths of the two vectors.

    Raises:
        ValueError: `cross_teacher` embeds images and texts in vectors of different widths.
    """

    def __init__(self, args: TeacherArguments, device: torch.device | str = "cpu"):
        names = {args.image_teacher, args.text_teacher, args.cross_teacher}
        encoders = {name: Encoder(name, args.teacher_pooling, device) for name in names}
        self.encoders = list(encoders.values())
        self.own = {IMAGE: encoders[args.image_teacher], TEXT: encoders[args.text_teacher]}
        self.cross = encoders[args.cross_teacher]
        own = {modality: encoder.preprocess for modality, encoder in self.own.items()}
        self.preprocess = TeacherPreprocessor(own, self.cross.preprocess)
        images, texts = [Image.new("RGB", (32, 32))], ["a"]
        self.own_width = max(self.own[IMAGE](images).shape[1], self.own[TEXT](texts).shape[1])
        self.cross_width = self.cross(texts).shape[1]
        if self.cross(images).shape[1] != self.cross_width:
            raise ValueError(f"`cross_teacher` {args.cross_teacher} gives images and texts different widths.")

    def modality_columns(self, triple_kernel: bool = True) -> dict[tuple[int, int], tuple[int, int]]:
        """Returns the columns in which slices are compared, as [`slice_columns`] does."""
        return slice_columns(self.own_width, self.cross_width, triple_kernel)

    @property
    def truncated(self) -> int:
        """Number of texts that the encoders have truncated so far."""
        return sum(encoder.truncated for encoder in self.encoders)

    def __call__(self, slices: list[Slice]) -> torch.Tensor:
        """Returns the features of slices. Slices of equal content are encoded once.

        Returns:
            `torch.FloatTensor` of shape `(len(slices), own_width + cross_width)`, float32, on the encoders' device.
        """
        keys = [part.key for part in slices]
        distinct = dict(zip(keys, slices, strict=True))
        places = {key: place for place, key in enumerate(distinct)}
        features = self.encode(self.preprocess(list(distinct.values())))
        return features[torch.tensor([places[key] for key in keys], device=features.device)]

    def encode(self, inputs: TeacherInputs) -> torch.Tensor:
        """Returns the features of the slices that `preprocess` was given.

        Returns:
            `torch.FloatTensor` of shape `(inputs.count, own_width + cross_width)`, float32, on the encoders' device.
        """
        features = torch.zeros(inputs.count, self.own_width + self.cross_width, device=self.cross.device)
        for modality, places in inputs.places.items():
            rows = torch.tensor(places, device=features.device)
            vectors = self.own[modality].encode(inputs.own[modality])
            features[rows, : vectors.shape[1]] = vectors
            features[rows, self.own_width :] = self.cross.encode(inputs.cross[modality])
        return features


def slice_columns(
    own_width: int, cross_width: int, triple_kernel: bool = True
) -> dict[tuple[int, int], tuple[int, int]]:
    """Returns the columns of the features in which two slices are compared, for each pair of modalities.

    The dict is what `hf_unigd.kernels` takes as `modality_columns`. Its type is a plain dict because `data` does not
    import `kernels`.

    Args:
        own_width, cross_width: Widths of the two vectors that the features consist of.
        triple_kernel: Whether slices of one modality are compared by their own teacher. Otherwise `cross_teacher`
            compares all slices (table 4b, "w/o TK").

    Returns:
        First column and end column (exclusive) by `(IMAGE, IMAGE)`, `(TEXT, TEXT)` and `(IMAGE, TEXT)`.
    """
    cross = (own_width, own_width + cross_width)
    own = (0, own_width) if triple_kernel else cross
    return {(IMAGE, IMAGE): own, (TEXT, TEXT): own, (IMAGE, TEXT): cross}

"""Models that caption images on this machine."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig

from ..data.lengths import sequence_length
from ..hub import load_checkpoint
from ..inputs import reading
from ..modeling import UniGDConfig, UniGDProcessor
from ..modeling.hub_files_unigd import is_adapter


KINDS = ("short", "long")
# What models with a chat template are asked.
QUESTIONS = {
    "short": "Describe the image in one short sentence.",
    "long": "Describe the image in detail.",
}
# What models without one continue: BLIP-2's own prompt for captions.
BEGINNINGS = {"short": "a photo of"}


class Preparation:
    """Makes what a captioner takes of images. It may run in the workers of a data loader."""

    def __call__(self, images: Sequence[Image.Image]) -> Any:
        """What [`Captioner`] takes."""
        raise NotImplementedError

    def length(self, image: Image.Image) -> int:
        """By which images are sorted, so that those of a batch need little padding."""
        raise NotImplementedError


class Captioner:
    """
    Captions images.

    Attributes:
        description: What captions depend on, besides the images, by the names of arguments.
        batch_size: Number of images at once.
        preparation: Makes what the captioner takes of images.
    """

    description: Mapping[str, Any]
    batch_size: int
    preparation: Preparation

    def __call__(self, inputs: Any) -> list[str | ValueError]:
        """The captions of prepared images, in their order. An error stands for an image that is refused; its message
        continues "Row 3 ..."."""
        raise NotImplementedError


class LocalCaptioner(Captioner):
    """
    A vision-language model that transformers loads, or a checkpoint of ours.

    Args:
        name: Hub id or folder.
        kind: `"short"` or `"long"`: the default of `prompt`.
        prompt: What the model is asked about an image; without a chat template, the text that it continues. By default
            one of `QUESTIONS` or `BEGINNINGS`, and before a long caption of our own checkpoints the embedding prompt,
            which training puts there.
        generate_kwargs: Arguments of `generate`.
        batch_size: Number of images at once.
        dtype: Data type to load the model in.
        device: Device that it runs on.

    Raises:
        ValueError: the model cannot be loaded, or has no chat template and needs a `prompt`.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        prompt: str | None = None,
        *,
        generate_kwargs: Mapping[str, Any],
        batch_size: int = 32,
        dtype: str = "auto",
        device: torch.device | str = "cpu",
    ):
        self.generate_kwargs = dict(generate_kwargs)
        self.batch_size = batch_size
        self.preparation: Preparation
        if _is_ours(name):
            self.model, processor = load_checkpoint(name, dtype=dtype)
            self.preparation = _SequencePreparation(processor, kind, prompt)
        else:
            with reading(name):
                processor = AutoProcessor.from_pretrained(name)
            self.preparation = _ChatPreparation(name, processor, kind, prompt)
            with reading(name):
                self.model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
        self._decode = processor.batch_decode
        self.model.to(device).eval()
        self.description = {
            "model": name,
            "revision": getattr(self.model.config, "_commit_hash", None),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "prompt": prompt,
            **self.generate_kwargs,
        }

    @torch.no_grad()
    def __call__(self, inputs) -> list[str | ValueError]:
        inputs = inputs.to(self.model.device, self.model.dtype)
        generated = self.model.generate(**inputs, **self.generate_kwargs)
        given = inputs["input_ids"]
        if torch.equal(generated[:, : given.shape[1]], given):  # encoder-decoder models return the answer alone
            generated = generated[:, given.shape[1] :]
        return list(self._decode(generated, skip_special_tokens=True))


def _is_ours(name: str) -> bool:
    with reading(name):
        if is_adapter(name, {}):
            return True
        config, _ = PreTrainedConfig.get_config_dict(name)
    return config.get("model_type") == UniGDConfig.model_type


class _SequencePreparation(Preparation):
    """For our own checkpoints: as `hf-unigd generate` does with and without `--prompt`."""

    def __init__(self, processor: UniGDProcessor, kind: str, prompt: str | None):
        self.processor = processor
        self.prompt = prompt or {"short": QUESTIONS["short"]}.get(kind)

    def __call__(self, images):
        return self.processor.process_sequences(
            [self._sequence(image) for image in images],
            prompted=self.prompt is None,
            prompt_name="query" if self.prompt is None else None,
            padding_side="left",
        )

    def length(self, image: Image.Image) -> int:
        return sequence_length(self.processor, self._sequence(image))

    def _sequence(self, image: Image.Image) -> list[Any]:
        return [image, *([self.prompt] if self.prompt else [])]


class _ChatPreparation(Preparation):
    """For other models: a question about the image, or without a chat template the beginning of a caption."""

    def __init__(self, name: str, processor: Any, kind: str, prompt: str | None):
        self.processor = processor
        self.has_template = getattr(processor, "chat_template", None) is not None
        if prompt is None and not self.has_template and kind not in BEGINNINGS:
            raise ValueError(
                f"{name} has no chat template to ask for a {kind} caption with. Give `--prompt`, the text that it "
                "continues."
            )
        self.prompt = prompt or (QUESTIONS if self.has_template else BEGINNINGS)[kind]
        self.text = self.prompt
        if self.has_template:
            content = [{"type": "image"}, {"type": "text", "text": self.prompt}]
            self.text = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )

    def __call__(self, images):
        begin = self.processor.tokenizer.bos_token
        return self.processor(
            images=[[image] for image in images] if self.has_template else list(images),
            text=[self.text] * len(images),
            return_tensors="pt",
            padding=True,
            padding_side="left",
            # Many templates write what a tokenizer begins with.
            add_special_tokens=not (begin and self.text.startswith(begin)),
        )

    def length(self, image: Image.Image) -> int:
        return image.width * image.height  # with which the number of tokens grows, if it is not fixed

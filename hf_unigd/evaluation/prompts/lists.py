"""The prompts that are compared: those of a file, and those that the model has."""

from pathlib import Path

import yaml

from ...inputs import reading
from ...modeling import UniGDProcessor


PROMPTS_FILE = Path(__file__).with_name("prompts.yaml")
MODALITIES = ("image", "text")
SOFT_PROMPT = "(the soft prompt of the model)"


def load_prompts(file: str | Path | None = None) -> dict[str, list[str]]:
    """
    Reads a YAML file of two lists, `image` and `text`.

    Args:
        file: The file. By default, that of this package, which has 50 prompts of each kind.

    Returns:
        The prompts by modality, in the order of the file.

    Raises:
        ValueError: the file cannot be read, a list is missing, is empty or names a prompt twice, there is another key,
            or a prompt is no text.
    """
    file = Path(PROMPTS_FILE if file is None else file)
    with reading(file):
        text = file.read_text(encoding="utf-8")
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(
            f"{file} is not valid YAML: {error}. Write each prompt on a line of its own, after `- `, and put "
            "quotation marks around one with a colon."
        ) from error
    if not isinstance(found, dict) or found.keys() != set(MODALITIES):
        keys = sorted(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{file} must have the keys `image` and `text`, each with a list of prompts, got {keys}.")
    for modality, prompts in found.items():
        if not isinstance(prompts, list) or not prompts:
            raise ValueError(f"{file}: `{modality}` must be a list of prompts that is not empty.")
        for place, prompt in enumerate(prompts):
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(
                    f"{file}: prompt {place} of `{modality}` must be a text, got {prompt!r}. Put quotation marks "
                    "around a text with a colon."
                )
            if prompt in prompts[:place]:
                raise ValueError(f"{file}: `{modality}` has the prompt {prompt!r} twice. Remove one.")
    return found


def candidates(processor: UniGDProcessor, prompts: dict[str, list[str]]) -> dict[str, dict[str, UniGDProcessor]]:
    """
    A processor for each prompt.

    Args:
        processor: The processor of the model. What it embeds with is the first candidate.
        prompts: Hand-written prompts by modality.

    Returns:
        For each modality, processors by the names of their prompts: hand-written prompts are their own names.

    Raises:
        ValueError: the processor embeds without a prompt, or a prompt holds a reserved token.
    """
    if processor.embedding_position != "prompt":
        raise ValueError(
            f"The model embeds at `embedding_position={processor.embedding_position!r}`, where no prompt has an "
            "effect. Compare the prompts of a model that embeds at its prompt."
        )
    return {
        modality: {name: with_prompt(processor, modality, name) for name in [*_own(processor, modality), *prompts]}
        for modality, prompts in prompts.items()
    }


def with_prompt(processor: UniGDProcessor, modality: str, name: str) -> UniGDProcessor:
    """
    A processor like `processor`, with one prompt changed. Its image slices hold all tokens of an image.

    Args:
        processor: The processor.
        modality: `"image"` or `"text"`.
        name: The hand-written prompt, or [`SOFT_PROMPT`] for that of `processor`.

    Raises:
        ValueError: the prompt is empty or holds a reserved token.
    """
    is_soft = name == SOFT_PROMPT
    return UniGDProcessor(
        processor.vlm_processor,
        prompts=processor.prompts if is_soft else {modality: name},
        soft_prompts=processor.soft_prompts if is_soft else None,
        instructions=processor.instructions,
    )


def _own(processor: UniGDProcessor, modality: str) -> list[str]:
    return [SOFT_PROMPT] if processor.soft_prompts else [processor.prompts[modality]]

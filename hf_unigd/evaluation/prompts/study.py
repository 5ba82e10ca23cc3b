"""Compares prompts on a dataset from beginning to end."""

from pathlib import Path
from typing import Any

import torch

from ...bulk import on_first_process, process_state
from ...data.example import iter_images
from ...hub.loading import load_checkpoint_or_vlm
from ...modeling import UniGDForConditionalGeneration, UniGDProcessor
from ...modeling.images_unigd import MAX_PIXELS
from ...outputs import new_folder
from ..figures import make_figure
from ..matches import ImageSettings
from .comparison import PromptComparison
from .items import read_captioned_images
from .lists import SOFT_PROMPT, candidates, load_prompts, with_prompt
from .passes import begin_parts, run_prompts
from .report import write_report
from .views import ModelView, top_tokens, view_attention


def compare_prompts(
    model_name: str,
    rows: Any,
    output: str | Path,
    *,
    before: str | None = None,
    prompts: dict[str, list[str]] | None = None,
    dtype: str = "auto",
    max_rows: int = 1000,
    attention_images: int = 4,
    image_folder: str | None = None,
    max_image_pixels: int = MAX_PIXELS,
    batch_size: int = 32,
    overwrite: bool = False,
    show_progress: bool = True,
) -> PromptComparison:
    """
    Compares prompts, and writes tables and figures of them ([`write_report`]). A run that was interrupted goes on:
    what the prompts have been run on is kept in a hidden folder beside `output` until it is finished. If a launcher
    started several processes, all call this, share the work, and receive the same comparison; the first writes.

    Args:
        model_name: Hub id or folder of a checkpoint, an adapter, or a plain vision-language model.
        rows: A dataset of captioned images.
        output: Folder to write, new or empty.
        before: The same of a model before its training, to compare the best pair of prompts with.
        prompts: Hand-written prompts for `"image"` and for `"text"`; by default, those that we ship
            ([`load_prompts`]).
        dtype: Type to load the models in.
        max_rows: As in [`read_captioned_images`].
        image_folder, max_image_pixels: As in [`~hf_unigd.evaluation.matches.ImageSettings`].
        attention_images: Number of images to draw attention over, at equal distances.
        batch_size: Images or captions per forward pass.
        overwrite: Throw away what an interrupted run has left.
        show_progress: Whether to draw progress bars.

    Returns:
        The comparison. The first prompt of each modality is that of the model.

    Raises:
        ImportError: matplotlib is not installed.
        RowError: a row is bad, or is no captioned image.
        ValueError: the prompts are not valid, the model embeds without a prompt or returns no attention weights, or
            what was begun was begun with another model, other prompts or other rows.
        FileExistsError: `output` holds files.
    """
    make_figure()  # before the work, to see whether matplotlib is installed
    output = Path(output)
    show_progress = show_progress and process_state().is_main_process
    model, processor = _load(model_name, dtype)
    processors = candidates(processor, prompts or load_prompts())
    items = read_captioned_images(rows, processor, max_rows, ImageSettings(image_folder, max_image_pixels))

    parts = begin_parts(output, model, processors, items, model_name, batch_size, overwrite)
    summaries = run_prompts(model, processors, items, parts, batch_size, show_progress)
    names = {modality: list(by_name) for modality, by_name in processors.items()}
    comparison = on_first_process(lambda: PromptComparison.of(names, summaries, items, model, show_progress))
    best = comparison.pair(comparison.best())
    count = min(attention_images, items.count("image"))
    shown, numbers = items.read("image", [place * items.count("image") // count for place in range(count)])

    def view(model, processor, image_prompt: UniGDProcessor, probabilities: dict[str, torch.Tensor]) -> ModelView:
        tokens = {each: top_tokens(processor, mean) for each, mean in probabilities.items()}
        return ModelView(tokens, view_attention(model, image_prompt, shown, numbers))

    means = {each: comparison.probabilities[each][name] for each, name in best.items()}
    image_prompt = processors["image"][best["image"]]
    views = {"after" if before else "model": on_first_process(lambda: view(model, processor, image_prompt, means))}
    begun = [parts]
    if before:
        del model
        model, earlier = _load(before, dtype)
        # A soft prompt has started from the hand-written one.
        written = {each: processor.prompts[each] if name == SOFT_PROMPT else name for each, name in best.items()}
        processors = {each: {name: with_prompt(earlier, each, name)} for each, name in written.items()}
        apart = output.with_name(f"{output.name}.before")
        begun.append(begin_parts(apart, model, processors, items, before, batch_size, overwrite))
        summaries = run_prompts(model, processors, items, begun[-1], batch_size, show_progress)
        means = {each: found.probabilities[0] for each, found in summaries.items()}
        image_prompt = processors["image"][written["image"]]
        views = {"before": on_first_process(lambda: view(model, earlier, image_prompt, means)), **views}

    def write() -> None:
        with new_folder(output) as folder:
            write_report(comparison, views, [next(iter_images(sequence)) for sequence in shown], numbers, folder)
        for each in begun:
            each.remove()

    on_first_process(write)
    return comparison


def _load(name: str, dtype: str) -> tuple[UniGDForConditionalGeneration, UniGDProcessor]:
    model, processor = load_checkpoint_or_vlm(name, dtype=dtype)
    return model.to(process_state().device).eval(), processor

"""Limits of what a config may ask for: a damaged one must not take all memory, or days."""

import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)


MAX_SIZE = 1 << 27  # of anything that a config counts: tokens, layers, widths, pixels of a video
MAX_PROCESSOR_SIZE = 1 << 18  # of what a processor counts other than pixels: tokens of an image, sides


def check_sizes(name: str, config: dict, largest: int = MAX_SIZE) -> None:
    """
    Args:
        name (`str`): What the config is called, for the message.
        config (`dict`): A config as it was read, of which nothing has been built yet.
        largest (`int`, *optional*): The largest number allowed. For numbers of pixels it is `MAX_SIZE` in any case.

    Raises:
        ValueError: it holds a number that is larger than any model's. Some configs make lists of that length, and
            processors make texts or images of that size.
    """
    found: list[tuple[str, object]] = [(name, config)]
    while found:
        path, value = found.pop()
        if isinstance(value, dict):
            found += [(f"{path}.{key}", each) for key, each in value.items()]
            if isinstance(value.get("height"), int) and isinstance(value.get("width"), int):
                found.append((f"{path}.height * width", value["height"] * value["width"]))
        elif isinstance(value, list):
            found += [(path, each) for each in value]
        elif (
            isinstance(value, int)
            and value > (MAX_SIZE if re.search(r"pixels|edge|height \* width", path) else largest)
            and "theta" not in path  # a base of angles, not a size
        ):
            raise ValueError(f"`{path}` is {value}, which is larger than any model's.")


@contextmanager
def as_large_as(name, files: Iterable[str | Path]) -> Iterator[None]:
    """
    A context in which a model is built and loaded, and stopped as soon as it is much larger than the tensors in
    `files`: its config then is not that of these tensors. transformers builds models without memory for their tensors
    first, so this costs neither memory nor time.

    Args:
        name (`str` or `os.PathLike`): What is loaded, for the message.
        files: The safetensors that it is loaded from. Without any, there is nothing to compare with.

    Raises:
        ValueError: the model is larger, or a file is damaged.
    """
    sizes = [size for file in files for size in _tensor_sizes(file)]
    # Tied tensors are saved once, and resizing registers a tensor anew. Modules may hold no tensor.
    most_elements, most_parts = 4 * sum(sizes), 1000 + 16 * len(sizes)
    elements: dict[tuple[nn.Module, str], int] = {}  # by owner, because loading replaces what building registered
    total = 0
    thread = threading.get_ident()  # the hooks see what other threads build, too

    def count(module, name_of_part, part):
        nonlocal total
        if threading.get_ident() != thread or part is None:
            return
        size = part.numel() if isinstance(part, nn.Parameter) else 0
        total += size - elements.get((module, name_of_part), 0)
        elements[module, name_of_part] = size
        if len(elements) > most_parts or total > most_elements:
            raise ValueError(
                f"{name} holds {len(sizes)} tensors of {sum(sizes):,} elements, but its config asks for many more. "
                "The config is damaged, or belongs to another checkpoint."
            )

    if not sizes:
        yield
        return
    handles = register_module_parameter_registration_hook(count), register_module_module_registration_hook(count)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensor_sizes(file: str | Path) -> list[int]:
    """How many elements each tensor of a file may become, by its header alone."""
    sizes = []
    try:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - it is no dict
                header = tensors.get_slice(key)
                size = 1
                for length in header.get_shape():
                    size *= length
                # Quantised weights lie packed in integers, of which a byte may hold four.
                sizes.append(size if "F" in header.get_dtype() else size * 32)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}. Save or download it again.") from error
    return sizes

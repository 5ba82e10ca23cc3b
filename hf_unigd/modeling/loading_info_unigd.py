"""What becomes of the reports and errors of transformers at a load: no tensor may be random, no error nameless."""

from collections.abc import Iterator
from contextlib import contextmanager


def raise_if_random(name, loading_info: dict) -> None:
    """
    Args:
        name: What was loaded, for the message.
        loading_info (`dict`): As `from_pretrained(..., output_loading_info=True)` returns it.

    Raises:
        RuntimeError: a tensor is missing from the checkpoint or has another shape there, so that it would be random.
    """
    missing, mismatched = sorted(loading_info["missing_keys"]), sorted(loading_info["mismatched_keys"])
    unexpected = sorted(loading_info["unexpected_keys"])
    if missing or mismatched:
        raise RuntimeError(
            f"Loading {name} would leave tensors random.\n"
            + (f"Missing from the checkpoint: {', '.join(missing)}.\n" if missing else "")
            + (f"Of another shape in the checkpoint: {', '.join(map(str, mismatched))}.\n" if mismatched else "")
            + (f"In the checkpoint, but not in the model: {', '.join(unexpected)}.\n" if unexpected else "")
            + "The checkpoint is incomplete, or its config names another head or backbone than it was saved with."
        )


@contextmanager
def errors_name(name) -> Iterator[None]:
    """
    A context in which an error of the program becomes one about the checkpoint: deep in transformers, a wrong value in
    a config is an attribute that something does not have.

    Args:
        name (`str` or `os.PathLike`): What is loaded.

    Raises:
        ValueError: in place of an error that does not say what was wrong with the checkpoint.
    """
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError) as error:
        raise ValueError(
            f"{name} cannot be loaded, because an argument or a value in its config is wrong: "
            f"{type(error).__name__}: {error}"
        ) from error

"""Checks what transformers reports about a load: no tensor of a trained model may be random."""


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

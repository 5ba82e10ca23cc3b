"""Embedding prompts: hand-written texts that end what is embedded, one for each modality."""

# The image prompt is VladVA's (figure 4); the paper does not give its text prompt, and ours is made like it.
DEFAULT_PROMPTS = {
    "image": "Summarize the provided image in one word",
    "text": "Summarize the provided text in one word",
}


def check_prompts(prompts: dict[str, str] | None, find_reserved) -> dict[str, str]:
    """
    The prompts of all modalities: those that are given, and the default ones of the others.

    Args:
        prompts (`dict[str, str]`, *optional*): Prompts by modality.
        find_reserved (`Callable[[str], str | None]`): Returns the first reserved token in a text.

    Raises:
        ValueError: a modality is unknown, or a prompt is not a text, is empty, or holds a reserved token.
    """
    prompts = {**DEFAULT_PROMPTS, **(prompts or {})}
    if prompts.keys() != DEFAULT_PROMPTS.keys():
        raise ValueError(f"`prompts` takes the keys {sorted(DEFAULT_PROMPTS)}, got {sorted(prompts)}.")
    for modality, prompt in prompts.items():
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"The {modality} prompt must be a text that is not empty, got {prompt!r}.")
        if (reserved := find_reserved(prompt)) is not None:
            raise ValueError(
                f"The {modality} prompt {prompt!r} holds the reserved token {reserved!r}, which the model would not "
                "read as text. Remove it."
            )
    return prompts

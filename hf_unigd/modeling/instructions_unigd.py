"""Instructions: texts that say what a sequence is embedded for, at the beginning of its first user's turn.

In a sequence, an instruction is a part `{"type": "instruction", "text": str}`. It is rendered as a text, but it is not
one of the sequence's slices, and it is left out where the sequence is not embedded.
"""

INSTRUCTION = "instruction"
# The names that sentence-transformers and MTEB give the two sides of retrieval. Others are those of tasks.
SIDES = ("query", "document")


def with_instruction(sequence, instruction: str | None):
    """
    Puts an instruction before a sequence, in the place of the one that it has.

    Args:
        sequence: A text, an image, a list of both, or chat messages.
        instruction (`str`, *optional*): The instruction; white space around it is removed. Without one, the sequence
            is returned as it is.

    Returns:
        Chat messages. What is empty or has no user's turn is returned as it is, for the renderer to refuse.
    """
    if instruction is None:
        return sequence
    turns = list(sequence) if isinstance(sequence, (list, tuple)) else [sequence]
    if turns and not isinstance(turns[0], dict):
        turns = [{"role": "user", "content": turns}]
    turns = without_instruction(turns)
    place = next((place for place, turn in enumerate(turns) if _role(turn) == "user" and turn.get("content")), None)
    if place is None:
        return sequence
    content = turns[place]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    turns[place] = {**turns[place], "content": [{"type": INSTRUCTION, "text": instruction.strip()}, *parts]}
    return turns


def without_instruction(sequence):
    """A sequence without its instruction, if it has one."""
    if not isinstance(sequence, (list, tuple)) or not any(_has_instruction(turn) for turn in sequence):
        return sequence
    return [
        {**turn, "content": [part for part in turn["content"] if not is_instruction(part)]}
        if _has_instruction(turn)
        else turn
        for turn in sequence
    ]


def is_instruction(part) -> bool:
    """Whether a part of a turn is an instruction."""
    return isinstance(part, dict) and part.get("type") == INSTRUCTION


def check_instructions(instructions: dict[str, str] | None, find_reserved) -> dict[str, str]:
    """
    The named instructions of a processor, without white space around them.

    Raises:
        ValueError: a name or an instruction is not a text, is empty, or holds a reserved token.
    """
    for name, text in (instructions or {}).items():
        if not isinstance(name, str) or not isinstance(text, str) or not name or not text.strip():
            raise ValueError(f"`instructions` takes texts by name, and none that is empty; got {name!r}: {text!r}.")
        reserved = find_reserved(text)
        if reserved is not None:
            raise ValueError(
                f"The instruction {name!r} holds the reserved token {reserved!r}, which the model would not read as "
                "text. Remove it."
            )
    return {name: text.strip() for name, text in (instructions or {}).items()}


def _role(turn):
    return turn.get("role") if isinstance(turn, dict) else None


def _has_instruction(turn) -> bool:
    content = turn.get("content") if isinstance(turn, dict) else None
    return isinstance(content, (list, tuple)) and any(map(is_instruction, content))

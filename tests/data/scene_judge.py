"""Judges captions and questions by the icons of a picture alone: it parses the words and looks for what they name."""

import re

import numpy as np


COLOURS = ["red", "yellow", "green", "cyan", "blue", "purple", "pink", "brown", "black"]
PHRASE = re.compile(r"(?P<count>a|two)(?: (?P<size>small|large))?(?: (?P<colour>[a-z]+))? (?P<shape>[a-z]+)")


def named(phrase: str) -> dict:
    """What a phrase such as "two small red cars" names, as values that icons must have, and their `count`."""
    words = PHRASE.fullmatch(phrase).groupdict()
    assert words["colour"] in (*COLOURS, None), phrase
    if words["count"] == "two":
        assert words["shape"].endswith("s"), phrase
        words["shape"] = words["shape"][:-1]
    return {name: value for name, value in words.items() if value is not None}


def found(phrase: str, icons: list[dict]) -> np.ndarray | None:
    """The middle of the icons that a phrase names, or None if there are not as many as it says."""
    values = named(phrase)
    count = {"a": 1, "two": 2}[values.pop("count")]
    matching = [(icon["x"], icon["y"]) for icon in icons if all(icon[name] == values[name] for name in values)]
    return np.mean(matching, axis=0) if len(matching) == count else None


def holds(caption: str, icons: list[dict]) -> bool:
    """Whether a caption is true of the icons."""
    return all(_part_holds(part, icons) for part in caption.split(" and "))


def _part_holds(caption: str, icons: list[dict]) -> bool:
    phrases = re.split(r" (to the left of|to the right of|above|below) ", caption)
    places = [found(phrase, icons) for phrase in phrases[::2]]
    if any(place is None for place in places):
        return False
    if len(phrases) == 1:
        return True
    _, relation, _ = phrases
    right, down = places[1] - places[0]
    # Eight pixels are a fourth of the distance of two things, and twice as much as they are shifted.
    beside, aslant = {"to the left of": (right, down), "to the right of": (-right, down)}.get(relation, (down, right))
    return (-beside if relation == "below" else beside) > 8 and abs(aslant) < 8


def long_holds(caption: str, icons: list[dict]) -> bool:
    """Whether each sentence of a long caption is true of the icons."""
    total, places, relation = caption.removesuffix(".").split(". ")
    number = re.fullmatch(r"On a white ground there are (two|three|four) drawn icons", total)[1]
    if ["two", "three", "four"].index(number) + 2 != len(icons):
        return False
    sides = {"on the left": (-1, 0), "on the right": (1, 0), "at the top": (0, -1), "at the bottom": (0, 1)}
    phrases = []
    for part in (places[0].lower() + places[1:]).split(", and "):
        side, verb, phrase = re.fullmatch(
            r"(on the left|on the right|at the top|at the bottom) (is|are) (.+)", part
        ).groups()
        place = found(phrase, icons)
        if place is None or (verb == "is") != phrase.startswith("a "):
            return False
        away = np.array(sides[side]) @ (place - 32)
        if away < 8:
            return False
        phrases.append(phrase)
    first, verb, between, second = re.fullmatch(
        r"The (\w+) (is|are) (to the left of|to the right of|above|below) the (\w+)", relation
    ).groups()
    agrees = [first, second] == [phrase.split()[-1] for phrase in phrases] and (verb == "is") == phrases[0].startswith(
        "a "
    )
    return agrees and holds(f"{phrases[0]} {between} {phrases[1]}", icons)


def answer(question: str, icons: list[dict]) -> str:
    """The answer to "Is there a red star in the image?", of which there may be several."""
    values = named(re.fullmatch(r"Is there (.+) in the image\?", question)[1])
    values.pop("count")
    return "yes" if any(all(icon[name] == values[name] for name in values) for icon in icons) else "no"

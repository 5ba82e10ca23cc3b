"""The scenes: what their captions say of their pictures, by a judge that knows the icons and their places alone."""

import re
from collections import Counter
from functools import cache
from itertools import combinations, pairwise
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scene_judge
from hf_unigd.data import RowParser, load_rows, load_scenes
from hf_unigd.data.scenes import CONFIGURATIONS, KINDS, POPULAR
from scene_judge import holds


SPLITS = st.sampled_from(["train", "test"])
SEEDS = st.integers(0, 2**32)
COLOURS = {
    "red": (211, 47, 47),
    "yellow": (251, 192, 45),
    "green": (56, 142, 60),
    "cyan": (77, 208, 225),
    "blue": (25, 118, 210),
    "purple": (123, 31, 162),
    "pink": (244, 143, 177),
    "brown": (109, 76, 65),
    "black": (17, 17, 17),
}


def stored(*args, **kwargs) -> list[dict]:
    return list(load_scenes(*args, **kwargs).with_format(None))


@cache
def shown_rows(configuration):
    rows = load_scenes("test", configuration, count=210)
    return [rows[place] for place in range(len(rows))]


@settings(deadline=None, max_examples=25)
@given(SPLITS, SEEDS)
def test_captions_are_true_and_negatives_false(split, seed):
    for row in stored(split, count=40, seed=seed):
        assert holds(row["short_caption"], row["icons"]), row
        assert scene_judge.long_holds(row["long_caption"], row["icons"]), row
        assert not any(holds(text, row["icons"]) for text in row.get("negatives", [])), row
    for row in stored(split, "sugarcrepe", count=42, seed=seed):
        assert holds(row["caption"], row["icons"]) and not holds(row["negative_caption"], row["icons"]), row
    for row in stored(split, "sugarcrepe_pp", count=40, seed=seed):
        assert row["caption"] != row["caption2"]
        assert holds(row["caption"], row["icons"]) and holds(row["caption2"], row["icons"]), row
        assert not holds(row["negative_caption"], row["icons"]), row
    for row in stored(split, "winoground", count=40, seed=seed):
        true = [[holds(row[f"caption_{text}"], row[f"icons_{image}"]) for image in (0, 1)] for text in (0, 1)]
        assert true == [[True, False], [False, True]], row
        assert sorted(row["caption_0"].split()) == sorted(row["caption_1"].split())
    for row in stored(split, "pope", count=36, seed=seed):
        assert scene_judge.answer(row["question"], row["icons"]) == row["answer"], row


def test_the_judge_tells_true_from_false():
    icons = [
        {"shape": "star", "colour": "red", "size": "large", "x": 16, "y": 33},
        {"shape": "car", "colour": "blue", "size": "small", "x": 47, "y": 16},
        {"shape": "car", "colour": "blue", "size": "small", "x": 49, "y": 48},
    ]
    assert holds("a red star to the left of two blue cars", icons)
    assert holds("two small cars to the right of a large red star", icons)
    assert holds("a large star", icons) and holds("a red star and two cars", icons)
    for wrong in (
        "a red star to the right of two blue cars",
        "a red star above two blue cars",
        "a red star to the left of a blue car",
        "a red star to the left of two large blue cars",
        "a blue star to the left of two red cars",
        "a red star to the left of two blue cars and a green key",
        "a red star and a blue car",
        "a car",
    ):
        assert not holds(wrong, icons), wrong
    long = (
        "On a white ground there are three drawn icons. On the left is a red star, and on the right are two blue cars."
    )
    assert scene_judge.long_holds(f"{long} The star is to the left of the cars.", icons)
    assert not scene_judge.long_holds(f"{long} The star is to the right of the cars.", icons)
    wrong = long.replace("On the left", "At the top")
    assert not scene_judge.long_holds(f"{wrong} The star is to the left of the cars.", icons)
    assert scene_judge.answer("Is there a blue car in the image?", icons) == "yes"
    assert scene_judge.answer("Is there a red car in the image?", icons) == "no"


def test_negatives_differ_from_captions_in_what_their_kind_names():
    """The words that are lost and gained, by kind."""
    attributes = {*COLOURS, "small", "large"}
    rows = stored("test", "sugarcrepe", count=700)
    assert {kind: sum(row["kind"] == kind for row in rows) for kind in KINDS} == dict.fromkeys(KINDS, 100)
    for row in rows:
        right, wrong = Counter(row["caption"].split()), Counter(row["negative_caption"].split())
        lost, gained = set(right - wrong), set(wrong - right)
        kind = row["kind"]
        if kind.startswith("swap"):
            assert not lost and not gained
        elif kind == "replace_rel":
            assert lost | gained <= {"to", "the", "left", "right", "of", "above", "below"}
        elif kind == "replace_obj":
            assert len(lost) == len(gained) == 1 and not (lost | gained) & attributes
        elif kind == "replace_att":
            assert len(lost) == len(gained) == 1 and lost | gained <= attributes
        elif kind == "add_att":
            assert not lost and len(gained) == 1 and gained <= attributes
        else:
            assert not lost and row["negative_caption"].startswith(f"{row['caption']} and ")


def named_combinations(rows) -> set[tuple[str, str]]:
    """The pairs of a colour and a shape that texts name, and those that pictures show."""
    pairs = set()
    for row in rows:
        for name, value in row.items():
            if name.startswith("icons"):
                pairs |= {(icon["colour"], icon["shape"]) for icon in value}
            texts = value if isinstance(value, list) else [value]
            for text in texts:
                words = re.findall(r"[a-z]+", text) if isinstance(text, str) else []
                pairs |= {(colour, noun.removesuffix("s")) for colour, noun in pairwise(words) if colour in COLOURS}
    return pairs


def test_no_combination_of_the_test_split_is_named_or_shown_in_training():
    texts = [name for name in CONFIGURATIONS if name != "chats"]
    train, test = (
        set().union(*(named_combinations(stored(split, name, count=480)) for name in texts))
        for split in ("train", "test")
    )
    assert len(train) == 96 and len(test) == 48 and not train & test


def test_pictures_show_the_icons_at_their_places():
    for row in shown_rows("retrieval")[:40]:
        picture = np.array(row["image"]).astype(int)
        assert picture.shape == (64, 64, 3)
        for icon in row["icons"]:
            cell = picture[max(0, icon["y"] - 16) : icon["y"] + 16, max(0, icon["x"] - 16) : icon["x"] + 16]
            assert (cell == COLOURS[icon["colour"]]).all(-1).sum() > 10, icon
        for one, other in combinations(row["icons"], 2):  # icons do not overlap
            assert max(abs(one["x"] - other["x"]), abs(one["y"] - other["y"])) >= 28
        ink = (picture != 255).any(-1)
        share = {"small": 0.75, "large": 0.98}
        for icon in row["icons"]:  # no ink beyond the size of an icon
            half = int(16 * share[icon["size"]])
            ink[max(0, icon["y"] - half) : icon["y"] + half, max(0, icon["x"] - half) : icon["x"] + half] = False
        assert not ink.any()


def test_a_short_caption_is_true_of_its_own_picture_alone():
    rows = stored("test")
    assert len(rows) == 500
    for row in rows:
        assert sum(holds(row["short_caption"], other["icons"]) for other in rows) == 1
    with pytest.raises(ValueError, match="fewer than 5000"):
        load_scenes("test", count=5000)


def test_questions_do_not_give_their_answers_away():
    rows = stored("test", "pope", count=2400)
    asked = {
        category: [
            Counter(r["question"] for r in rows if (r["category"], r["answer"]) == (category, answer))
            for answer in ("yes", "no")
        ]
        for category in ("random", "popular", "adversarial")
    }
    for category, (yes, no) in asked.items():
        assert yes.total() == no.total() == 400
        if category != "adversarial":  # each question as often with either answer
            assert yes == no
    assert set(asked["popular"][0]) == {f"Is there a {shape} in the image?" for shape in POPULAR}
    # Who knows how often each question is answered by "yes" in training does no better than chance.
    counts = Counter((row["question"], row["answer"]) for row in stored("train", "pope"))
    guesses = [counts[row["question"], "yes"] > counts[row["question"], "no"] for row in rows]
    right = np.mean([guess == (row["answer"] == "yes") for guess, row in zip(guesses, rows, strict=True)])
    assert abs(right - 0.5) < 0.03


def scores(similar) -> dict[str, float]:
    """What the benchmarks score by the similarity of a picture, given by its icons, and a text."""

    def compared(configuration: str, images: tuple[str, ...], texts: tuple[str, ...]) -> np.ndarray:
        rows = shown_rows(configuration)
        return np.array([[[similar(row[image], row[text]) for image in images] for text in texts] for row in rows])

    rows = shown_rows("retrieval")
    table = np.array([[similar(row["icons"], other["short_caption"]) for other in rows] for row in rows])
    result = {"retrieval": np.mean(table.argmax(1) == np.arange(len(rows)))}
    right, wrong = compared("sugarcrepe", ("icons",), ("caption", "negative_caption"))[..., 0].T
    for kind in KINDS:
        of_kind = [row["kind"] == kind for row in shown_rows("sugarcrepe")]
        result[kind] = np.mean((right > wrong)[of_kind])
    one, two, wrong = compared("sugarcrepe_pp", ("icons",), ("caption", "caption2", "negative_caption"))[..., 0].T
    result["sugarcrepe_pp"] = np.mean((one > wrong) & (two > wrong))
    pairs = compared("winoground", ("icons_0", "icons_1"), ("caption_0", "caption_1"))
    text = (pairs[:, 0, 0] > pairs[:, 1, 0]) & (pairs[:, 1, 1] > pairs[:, 0, 1])
    image = (pairs[:, 0, 0] > pairs[:, 0, 1]) & (pairs[:, 1, 1] > pairs[:, 1, 0])
    result |= {"text": text.mean(), "image": image.mean(), "group": (text & image).mean()}
    rows = shown_rows("pope")
    said = [similar(row["icons"], row["question"]) > 0 for row in rows]
    return result | {"pope": np.mean([yes == (row["answer"] == "yes") for yes, row in zip(said, rows, strict=True)])}


def test_who_knows_the_answers_scores_one_and_a_random_embedder_chance():
    def knows(icons, text):
        """As if a text were the unit vector of what it says, and a picture the vector of all that is true of it."""
        return scene_judge.answer(text, icons) == "yes" if text.startswith("Is there") else holds(text, icons)

    @cache
    def vector(content):
        return np.random.default_rng(crc32(content.encode())).normal(size=16)

    assert set(scores(knows).values()) == {1.0}
    found = scores(lambda icons, text: vector(str(icons)) @ vector(text))
    assert found.pop("retrieval") < 0.05
    chance = dict.fromkeys((*KINDS, "pope"), 1 / 2) | {"sugarcrepe_pp": 1 / 3}
    chance |= {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}
    for name, value in found.items():
        rows = 30 if name in KINDS else 210
        assert abs(value - chance[name]) < 3.3 * (chance[name] * (1 - chance[name]) / rows) ** 0.5, name


def test_rows_are_repeated_by_a_seed_and_are_sources_by_name():
    assert stored("test", count=20) == stored("test", count=20) != stored("test", count=20, seed=1)
    counts = {"scenes/sugarcrepe": 1470, "scenes/sugarcrepe_pp": 1050, "scenes/winoground": 400, "scenes/pope": 600}
    for name, count in {"scenes": 500, **counts}.items():
        assert len(load_rows(name, split="test")) == count
    assert load_rows("scenes", split="test").with_format(None)[:20]["icons"] == [
        row["icons"] for row in stored("test", count=20)
    ]
    with pytest.raises(ValueError, match="not 'validation'"):
        load_scenes("validation")
    with pytest.raises(ValueError, match="sugarcrepe_pp, winoground, pope, chats, not 'mme'"):
        load_scenes("test", "mme")


def test_training_rows_are_parsed_with_the_limits_of_the_paper():
    parser = RowParser(lambda text: len(text.replace(".", " .").replace(",", " ,").split()))
    for rows in (load_scenes("train", count=50), load_scenes("test", count=50)):
        for place in range(50):
            row = rows[place]
            example = parser(row, place)
            assert example.positive[0]["content"][0]["text"] == row["short_caption"]
            assert example.target == row["long_caption"]
            assert len(example.negatives) == len(row.get("negatives", []))
    chats = load_scenes("train", "chats", count=4)
    for place in range(4):
        example, row = parser(chats[place], place), chats[place]
        assert example.target == row["messages"][-1]["content"] and example.label_history
        for question, answer in zip(row["messages"][::2], row["messages"][1::2], strict=True):
            assert scene_judge.answer(question["content"].removeprefix("<image>"), row["icons"]) == answer["content"]

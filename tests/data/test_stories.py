"""The stories that are told with icons."""

import pytest

from hf_unigd.data import RowParser, SentenceSplitter, load_rows, load_stories
from hf_unigd.data.example import IMAGE, TEXT
from hf_unigd.data.stories import cast_of_icons


@pytest.fixture(scope="module")
def stories():
    return load_stories("test", 20, cast=10)


def test_a_story_has_five_sentences_and_five_images_in_turn(stories):
    parser = RowParser(len, splitter=SentenceSplitter())
    for place in range(len(stories)):
        row = stories[place]
        assert len(row["captions"]) == len(row["images"]) == 5
        slices = parser(row, place).slices
        assert [part.modality for part in slices] == [TEXT, IMAGE] * 5 + [TEXT]
        assert [part.content for part in slices[:10:2]] == row["captions"]


def test_pairs_share_subjects_and_colours_but_end_differently(stories):
    for place in range(0, len(stories), 2):
        one, other = stories[place], stories[place + 1]
        words = [sorted(" ".join(row["captions"][:2]).replace(".", "").split()) for row in (one, other)]
        assert words[0] == words[1]
        assert one["captions"][-1] == other["captions"][-1]
        assert one["images"][-1].tobytes() != other["images"][-1].tobytes()
        assert one["messages"][1]["content"] != other["messages"][1]["content"]


def test_the_last_image_is_new_and_the_answer_describes_it(stories):
    for place in range(len(stories)):
        row = stories[place]
        earlier = {image.tobytes() for image in row["images"][:-1]}
        assert row["images"][-1].tobytes() not in earlier
        colour, name = row["messages"][1]["content"].removesuffix(".").split("It shows the ")[1].split(" ", 1)
        assert row["captions"][-1].endswith(f"turns {colour}.")
        # "the first" in the last sentence is the subject that the first sentence names
        assert f" {name}." in row["captions"][0]


def test_training_has_whole_stories_stories_with_one_image_and_single_images():
    rows = load_stories("train", 8, cast=4)
    shown = [len(rows[place]["images"]) for place in range(len(rows))]
    assert shown == [5, 5, 1, 1, 5, 5, 1, 1] + [1] * 4 * 8
    assert rows[8]["messages"][0]["content"].strip() == "<image>"
    assert len(rows[2]["captions"]) == 5


def test_splits_and_seeds_tell_different_stories():
    def told(rows):
        return {" ".join(rows[place]["captions"]) for place in range(20)}

    train, test, seeded = load_stories("train", 20), load_stories("test", 20), load_stories("test", 20, seed=1)
    assert not told(train) & told(test)
    assert told(test) != told(seeded)
    assert told(test) == told(load_stories("test", 20))


def test_stories_are_a_source_by_name():
    assert len(load_rows("stories", split="test")) == 4000
    with pytest.raises(ValueError, match="not 'validation'"):
        load_stories("validation")


def test_the_cast_has_short_names():
    assert len(cast_of_icons(50)) == 50 and all("_" not in name for name in cast_of_icons(50))

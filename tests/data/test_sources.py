"""The sources of rows."""

import json
from collections import Counter

import pytest
from datasets import Dataset, DatasetDict

from hf_unigd.data import load_icons, load_rows
from hf_unigd.data.icons import draw_icon
from tiny_models import make_image


ROWS = {"image": [make_image(place) for place in range(3)], "caption": ["a cat", "a dog", "a car"]}


def test_saved_datasets(tmp_path):
    Dataset.from_dict(ROWS).save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": Dataset.from_dict(ROWS)}).save_to_disk(str(tmp_path / "two"))
    assert load_rows(str(tmp_path / "one"))[0]["caption"] == "a cat"
    assert load_rows(str(tmp_path / "two"))[1]["caption"] == "a dog"
    assert next(iter(load_rows(str(tmp_path / "two"), streaming=True)))["caption"] == "a cat"
    with pytest.raises(ValueError, match=r"no split 'test', only \['train'\]"):
        load_rows(str(tmp_path / "two"), split="test")


def test_files_and_renamed_columns(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"jpg": f"{place}.png", "txt": "a cat"}) for place in range(2)))
    rows = load_rows(str(file), rename_columns={"jpg": "image", "txt": "caption"})
    assert rows.column_names == ["image", "caption"]
    streamed = load_rows(str(file), streaming=True, rename_columns={"jpg": "image", "txt": "caption"})
    assert next(iter(streamed)) == {"image": "0.png", "caption": "a cat"}


def test_icons_are_images_with_both_captions():
    rows = load_icons("test")
    assert len(rows) == 1000
    assert rows[0]["image"].size == (48, 48)
    assert rows[0]["short_caption"] == rows[0]["icon"].replace("_", " ")
    assert len(rows[0]["image"].getcolors(48 * 48)) > 2
    long_caption = rows[0]["long_caption"]
    assert long_caption.startswith(f"{rows[0]['short_caption']}, a ") and long_caption.endswith(" icon.")


def test_no_held_out_icon_is_in_training_by_name_or_by_look():
    train, test = load_icons("train"), load_icons("test")
    train_names = {row["icon"] for row in train.with_format(None)}
    test_names = {row["icon"] for row in test.with_format(None)}
    assert not train_names & test_names
    assert len(train_names) + len(test_names) > 7000
    looks = [
        {draw_icon(row["glyph"], "black", "large", 64).tobytes() for row in rows.with_format(None)}
        for rows in (train, test)
    ]
    assert not looks[0] & looks[1]


def test_views_of_an_icon_differ_and_a_seed_repeats_them():
    def captions(rows, start=0):
        return [rows[start + place]["long_caption"] for place in range(20)]

    rows = load_icons("train", views=2, seed=1)
    half = len(rows) // 2
    assert rows[0]["icon"] == rows[half]["icon"]
    assert captions(rows) != captions(rows, half)
    assert captions(rows) == captions(load_icons("train", views=2, seed=1))
    assert captions(rows) != captions(load_icons("train", views=2, seed=2))
    with pytest.raises(ValueError, match="'valid'"):
        load_icons("valid")


def test_every_word_of_a_held_out_icon_is_in_ten_training_names():
    taught = Counter(word for row in load_icons("train").with_format(None) for word in set(row["icon"].split("_")))
    for row in load_icons("test").with_format(None):
        words = row["icon"].split("_")
        assert len(words) > 1 and all(taught[word] >= 10 for word in words)

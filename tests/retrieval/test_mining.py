"""Mining negatives: they are what brute force finds, never a match, and the output trains as it is."""

import math
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from hf_unigd import UniGDTrainer, UniGDTrainingArguments
from hf_unigd.data import RowError, load_rows
from hf_unigd.data.images import open_image
from mining_cases import (
    COUNT,
    IMAGES,
    OTHERS,
    TEXTS,
    brute_force,
    build,
    captioned,
    embed,
    encoded,
    mine,
    mined,
    negatives_of,
    plain,
    texts_of,
)
from tiny_models import make_image


# The similarities of the model, which is not trained, are between 0.95 and 1.
RULES = [
    {},
    {"num_negatives": 2, "range_min": 2, "range_max": 5},
    {"max_score": 0.976, "range_max": 12},
    {"min_score": 0.988, "num_negatives": 1},
    {"absolute_margin": 0.001, "num_negatives": 1, "range_max": 12},
    {"relative_margin": 0.0005, "num_negatives": 1, "range_max": 12},
]


@pytest.fixture
def pair(llava):
    """A model and its processor, with instructions for both sides."""
    llava[1].instructions.update(query="Summarize the provided image", document="a picture of")
    llava[0].eval()
    return llava


def train_a_step(pair, folder, rows):
    """Trains on rows as they come, and returns how many negatives each has."""
    model, processor = pair
    arguments = UniGDTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = UniGDTrainer(model, arguments, train_dataset=rows, processing_class=processor)
    assert math.isfinite(trainer.train().training_loss)
    examples = trainer.train_dataset
    return [len(examples[place].negatives) for place in range(len(examples))]


def same_text(a, b):
    return plain(a) == plain(b)


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_negatives_of_images_are_the_texts_that_brute_force_finds(pair, tmp_path, rules):
    entries = [*TEXTS[2:], *OTHERS]
    index = texts_of(pair, tmp_path / "index", entries)
    rows = captioned()
    images = [open_image(encoded(image)) for image in IMAGES]
    expected = brute_force(
        pair,
        [[image] for image in images],
        TEXTS,
        entries,
        lambda row, place: not same_text(entries[place], TEXTS[row]),
        {"range_max": rules.get("range_min", 0) + rules.get("num_negatives", 3), **rules},
    )
    wanted = {row: [entries[place] for place in places] for row, places in enumerate(expected) if places}
    if not wanted:
        pytest.fail("the rules leave no row")
    report = mine(pair, index, rows, tmp_path / "mined", **rules)
    found = mined(tmp_path / "mined")
    assert [negatives_of(row) for row in found] == list(wanted.values())
    stored = rows.cast_column("image", Image(decode=False)).to_list()
    assert [{name: row[name] for name in stored[0]} for row in found] == [stored[place] for place in wanted]
    assert (report.rows, report.left_out) == (len(wanted), COUNT - len(wanted))
    assert load_rows(str(tmp_path / "mined")).features == Features(
        {**rows.features, **{f"negative_{n}": Value("string") for n in range(1, rules.get("num_negatives", 3) + 1)}}
    )
    if not rules:
        assert train_a_step(pair, tmp_path / "run", load_rows(str(tmp_path / "mined"))) == [3] * COUNT


def test_negatives_of_texts_are_images_with_their_bytes(pair, tmp_path):
    images = Dataset.from_dict(
        {"image": [{"bytes": encoded(image), "path": None} for image in IMAGES]}, Features({"image": Image()})
    )
    index = build(pair, tmp_path / "index", images, source="images")
    rows = Dataset.from_dict(
        {"anchor": TEXTS, "positive": [{"bytes": encoded(image), "path": None} for image in IMAGES]},
        Features({"anchor": Value("string"), "positive": Image()}),
    )
    mine(pair, index, rows, tmp_path / "mined", num_negatives=2)
    opened = [[open_image(encoded(image))] for image in IMAGES]
    expected = brute_force(
        pair, TEXTS, opened, opened, lambda row, place: row != place, {"num_negatives": 2, "range_max": 2}
    )
    found = mined(tmp_path / "mined")
    bytes_of = [[image["bytes"] for image in negatives_of(row)] for row in found]
    assert bytes_of == [[encoded(IMAGES[place]) for place in places] for places in expected]
    assert [row["positive"]["bytes"] for row in found] == [encoded(image) for image in IMAGES]
    assert train_a_step(pair, tmp_path / "run", load_rows(str(tmp_path / "mined"))) == [2] * COUNT


def test_an_index_of_several_modalities_gives_each_row_its_own(pair, tmp_path):
    rows = Dataset.from_dict({"anchor": OTHERS})
    index = build(pair, tmp_path / "index", rows, source="texts")
    images = Dataset.from_dict({"image": IMAGES}, Features({"image": Image()}))
    index = build(pair, tmp_path / "index", images, source="images")
    assert len(index) == len(OTHERS) + COUNT
    mine(pair, index, captioned(4), tmp_path / "texts", num_negatives=len(OTHERS))
    assert all(sorted(negatives_of(row)) == sorted(OTHERS) for row in mined(tmp_path / "texts"))
    pairs = Dataset.from_dict({"anchor": TEXTS, "positive": IMAGES}).cast_column("positive", Image())
    mine(pair, index, pairs, tmp_path / "images", num_negatives=COUNT - 1)
    stored = {image.tobytes() for image in IMAGES}
    for place, row in enumerate(mined(tmp_path / "images")):
        pixels = {open_image(image).tobytes() for image in negatives_of(row)}
        assert pixels == stored - {IMAGES[place].tobytes()}


def test_what_is_known_to_match_by_text_is_no_negative(pair, tmp_path):
    same = ["A RED  cat.", "a\u00a0red cat", "ａ red cat!", "two blue dogs", "The grass. ", "known already"]
    index = texts_of(pair, tmp_path / "index", [*same, "three people", "three people", "a car"])
    rows = Dataset.from_dict(
        {
            "anchor": ["the grass", "the grass", "a picture"],
            "positive": ["a red cat", "Two blue dogs", "small"],
            "hard_negative": ["known already", None, None],
        }
    )
    mine(pair, index, rows, tmp_path / "mined", num_negatives=2)
    found = mined(tmp_path / "mined")
    # Both rows of the same anchor know each other's matches; equal entries count as one.
    assert [sorted(negatives_of(row)) for row in found[:2]] == [["a car", "three people"]] * 2
    mine(pair, index, rows, tmp_path / "three", num_negatives=3)
    assert [row["anchor"] for row in mined(tmp_path / "three")] == ["a picture"]
    assert train_a_step(pair, tmp_path / "run", load_rows(str(tmp_path / "mined"))) == [3, 2, 2]


def test_matches_that_fill_the_first_ranks_are_passed_over(pair, tmp_path):
    """And so is the long caption, which the row predicts."""
    long = "a red cat and two blue dogs on the green grass " * 3
    index = texts_of(pair, tmp_path / "index", [*[OTHERS[4]] * 30, long, *TEXTS[:2]])
    rows = captioned(1, short_caption=[OTHERS[4]], long_caption=[long])
    mine(pair, index, rows, tmp_path / "mined", num_negatives=2)
    assert [sorted(negatives_of(row)) for row in mined(tmp_path / "mined")] == [sorted(TEXTS[:2])]
    with pytest.raises(ValueError, match="not enough negatives for any row"):
        mine(pair, index, rows, tmp_path / "more", num_negatives=3)


def test_what_is_known_to_match_by_its_pixels_is_no_negative(pair, tmp_path):
    again = encoded(IMAGES[0], "PNG", compress_level=0)
    assert again != encoded(IMAGES[0], "PNG")
    images = [again, encoded(IMAGES[0], "BMP"), *(encoded(image, "PNG") for image in IMAGES)]
    rows = {"image": [{"bytes": image, "path": None} for image in images], "caption": ["x", "X.", *"abcdefgHIJ"]}
    index = build(pair, tmp_path / "index", Dataset.from_dict(rows).cast_column("image", Image()), source="images")
    pairs = Dataset.from_dict({"anchor": ["a", "h"], "positive": IMAGES[:2]}).cast_column("positive", Image())
    mine(pair, index, pairs, tmp_path / "mined", num_negatives=8)
    first, second = ([open_image(image).tobytes() for image in negatives_of(row)] for row in mined(tmp_path / "mined"))
    pixels = [image.tobytes() for image in IMAGES]
    # The first image is the positive of "a". What comes along with another is the second anchor, "h".
    assert set(first) <= set(pixels[1:]) and len(set(first)) == 8
    assert set(second) == set(pixels) - {pixels[1], pixels[7]}


@pytest.mark.parametrize("id_column", [None, "key"])
def test_the_own_entry_of_a_row_is_no_negative(pair, tmp_path, id_column):
    """Though it holds other texts than the row."""
    keys = [f"key-{place}" for place in range(4)]
    entries = Dataset.from_dict({"anchor": [*OTHERS[:4]], "key": keys})
    index = build(pair, tmp_path / "index", entries, source="things", id_column=id_column)
    rows = captioned(4, key=keys)
    mine(pair, index, rows, tmp_path / "mined", source="things", id_column=id_column)
    found = mined(tmp_path / "mined")
    assert [sorted({*OTHERS[:4]} - {*negatives_of(row)}) for row in found] == [[text] for text in OTHERS[:4]]


def test_all_captions_of_an_image_are_matches_and_the_least_similar_sets_the_margin(pair, tmp_path):
    entries = [*TEXTS, *OTHERS]
    index = texts_of(pair, tmp_path / "index", entries)
    captions = [[TEXTS[6], *OTHERS[2:]], OTHERS[:2]]
    scores = [
        embed(pair, [[image]], "query") @ embed(pair, entries, "document").T
        for image, _ in zip(IMAGES, captions, strict=False)
    ]
    least = [
        score[0, [entries.index(text) for text in texts]].min() for score, texts in zip(scores, captions, strict=True)
    ]
    expected = []
    for score, texts, limit in zip(scores, captions, least, strict=True):
        ranked = [entries[place] for place in score[0].argsort(descending=True).tolist()]
        expected.append([text for text in ranked if text not in texts and score[0, entries.index(text)] <= limit][:2])
    listed = [{"image": image, "caption": texts} for image, texts in zip(IMAGES, captions, strict=False)]
    flat = [{"image": row["image"], "caption": text} for row in listed for text in row["caption"]]
    settings = {"absolute_margin": 0.0, "num_negatives": 2, "range_max": 12}
    for name, rows in {"listed": listed, "flat": flat}.items():
        dataset = Dataset.from_list(rows).cast_column("image", Image())
        report = mine(pair, index, dataset, tmp_path / name, **settings)
        found = [negatives_of(row) for row in mined(tmp_path / name)]
        texts = [row["caption"] for row in rows]
        assert found == [expected[any(text in captions[1] for text in np.atleast_1d(each))] for each in texts]
        assert len(found) == len(rows) and (report.differences >= 0).all()
        assert sorted({*report.positive_scores.round(5)}) == sorted({*np.array(least, np.float32).round(5)})


def chat(*parts):
    return [{"role": "user", "content": [{"type": "text", "text": part} for part in parts]}]


def test_chats_get_chats_of_texts_and_images(pair, tmp_path):
    content = [
        {"type": "image", "text": None},
        {"type": "text", "text": "what is it"},
    ]
    positive = [{"role": "user", "content": content}]
    entries = [{"messages": [{"role": "user", "content": [*content]}], "images": [image]} for image in IMAGES[:5]] + [
        {"messages": chat("only a text"), "images": []}
    ]
    index = build(pair, tmp_path / "index", as_chats(entries), source="entries")
    rows = [
        {"messages": chat(text), "positive_messages": [positive], "positive_images": [[image]], "images": []}
        for text, image in zip(TEXTS[:5], IMAGES, strict=False)
    ]
    mine(pair, index, as_chats(rows), tmp_path / "mined", num_negatives=2)
    opened = [[image, "what is it"] for image in IMAGES[:5]]
    expected = brute_force(
        pair, TEXTS[:5], opened, opened, lambda row, place: row != place, {"num_negatives": 2, "range_max": 2}
    )
    for row, places in zip(load_rows(str(tmp_path / "mined")), expected, strict=True):
        assert row["negative_messages"] == [positive] * 2
        pixels = [[image.tobytes() for image in images] for images in row["negative_images"]]
        assert pixels == [[IMAGES[place].tobytes()] for place in places]
    assert train_a_step(pair, tmp_path / "run", load_rows(str(tmp_path / "mined"))) == [2] * 5


def as_chats(rows):
    turn = {"role": Value("string"), "content": [{"type": Value("string"), "text": Value("string")}]}
    kinds = {"messages": [turn], "images": [Image()], "positive_messages": [[turn]], "positive_images": [[Image()]]}
    features = Features({name: kind for name, kind in kinds.items() if name in rows[0]})
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features)


def test_rows_of_mmeb_get_texts_and_images_at_their_tags(pair, tmp_path):
    texts = [None, "<|image_1|> seen from the left", "a car <|image_1|>", "<|image_1|>", "dogs"]
    rows = {
        "qry": TEXTS[:5],
        "pos_text": texts,
        "pos_image_path": [None if text == "dogs" else IMAGES[place] for place, text in enumerate(texts)],
    }
    rows = Dataset.from_dict(rows).cast_column("pos_image_path", Image())
    entries = [[IMAGES[5]], [IMAGES[6]], ["three people", IMAGES[7], "wave"], [IMAGES[8], "a"], ["x"], ["y"]]
    chats = [
        {
            "messages": [
                {"role": "user", "content": [
                    {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "text": None}
                    for part in entry
                ]}
            ],
            "images": [part for part in entry if not isinstance(part, str)],
        }
        for entry in entries
    ]  # fmt: skip
    index = build(pair, tmp_path / "index", as_chats(chats), source="entries")
    mine(pair, index, rows, tmp_path / "mined", num_negatives=2)
    found = load_rows(str(tmp_path / "mined"))
    assert [sorted(map(str, texts)) for texts in found["neg_text"]] == [
        ["<|image_1|>"] * 2,
        ["<|image_1|>a", "three people<|image_1|>wave"],
        ["<|image_1|>a", "three people<|image_1|>wave"],
        ["<|image_1|>"] * 2,
        ["x", "y"],
    ]
    assert [[image and image.tobytes() for image in images] for images in found["neg_image_path"]][4] == [None, None]
    assert train_a_step(pair, tmp_path / "run", found) == [2] * 5


def drawn():
    """Rows that a transform makes."""
    colours = Dataset.from_dict({"red": list(range(0, 200, 40))})

    def draw(batch):
        images = [PILImage.new("RGB", (8, 8), (red, 0, 0)) for red in batch["red"]]
        return {"image": images, "short_caption": [f"red {red}" for red in batch["red"]]}

    return colours.with_transform(draw)


@pytest.mark.parametrize("kind", ["workers", "stream", "transform"])
def test_workers_streams_and_transforms_give_the_same(pair, tmp_path, kind):
    index = texts_of(pair, tmp_path / "index", [*TEXTS, *OTHERS])
    rows = drawn() if kind == "transform" else captioned()
    mine(pair, index, rows if kind != "transform" else Dataset.from_list(list(rows)), tmp_path / "plain")
    settings = {"workers": {"num_workers": 2}, "stream": {"num_workers": 1}, "transform": {}}[kind]
    mine(pair, index, rows.to_iterable_dataset() if kind == "stream" else rows, tmp_path / "mined", **settings)
    assert mined(tmp_path / "mined") == mined(tmp_path / "plain")


def test_the_report_has_the_numbers(pair, tmp_path):
    index = texts_of(pair, tmp_path / "index", [*TEXTS, *OTHERS])
    report = mine(pair, index, captioned(), tmp_path / "mined", absolute_margin=0.0, num_negatives=2)
    text = str(report)
    assert report.rows + report.left_out == COUNT == report.positive_scores.size
    assert report.negative_scores.shape == report.differences.shape == (report.rows, 2)
    assert (report.differences >= 0).all() and all(a >= b for a, b in pairwise(report.negative_scores[0]))
    assert f"{report.positive_scores.mean():.4f}" in text and f"{report.differences.min():.4f}" in text
    assert f"Skipped {report.skipped['absolute_margin']}" in text and "due to the absolute_margin of 0.0" in text
    assert f"Left out {report.left_out} rows" in text and "`num_negatives`, `range_max`" in text
    again = mine(pair, index, captioned(), tmp_path / "mined", absolute_margin=0.0, num_negatives=2)
    assert str(again) == text  # also of a finished output


def test_rows_and_indexes_without_sense_are_refused(pair, tmp_path, caplog):
    index = texts_of(pair, tmp_path / "index", OTHERS)

    def refused(message, rows, error=ValueError, **settings):
        with pytest.raises(error, match=message):
            mine(pair, index, rows, tmp_path / "mined", **{"overwrite": True, **settings})

    pairs = Dataset.from_dict({"anchor": ["a"], "positive": IMAGES[:1]}).cast_column("positive", Image())
    refused("Row 0 has an image as its match.*its entries are a text. Index what", pairs, RowError)
    long = captioned(2, long_caption=["a cat " * 40] * 2)
    refused("Row 0 has no match", long.remove_columns("short_caption"), RowError)
    refused(r"no match, or a format without negatives", Dataset.from_dict({"image": IMAGES, "x": TEXTS}))
    refused(
        r"column `negative_2` already. Rename it \(`--rename_columns negative_2:other_negative_2`\)",
        captioned(2, negative_2=["a", "b"]),
    )
    refused("`range_max=1` leaves 1 candidates", captioned(2), range_max=1)
    refused("not enough negatives for any row.*overwrite true", captioned(2), num_negatives=len(OTHERS) + 1)
    mixed = captioned(3, short_caption=[" ", *TEXTS[1:3]])
    refused("Row 0 has an empty `short_caption`", mixed, RowError)
    assert mine(pair, index, mixed, tmp_path / "mined", overwrite=True, skip_bad_rows=True).rows == 2
    assert "Skipped: Row 0" in caplog.text and "Skipped 1 of 3 rows" in caplog.text
    with pytest.raises(ValueError, match="`num_negatives` was 3, now 2"):
        mine(pair, index, mixed, tmp_path / "mined", skip_bad_rows=True, num_negatives=2)


def test_a_damaged_image_of_an_entry_is_no_negative(pair, tmp_path, caplog):
    images = [encoded(make_image(place), "PNG") for place in range(4)]
    rows = Dataset.from_dict({"image": [{"bytes": image, "path": None} for image in images]})
    index = build(pair, tmp_path / "index", rows.cast_column("image", Image()), source="images")
    (batch,) = index.table.batches(index.table.schema.names, "id = 'images/3'")
    (entry,) = batch.to_pylist()
    entry["sequence"] = [{"text": None, "image": b"no image"}]
    index.table.replace(pa.Table.from_pylist([entry], index.table.schema))
    index.refresh()
    pairs = Dataset.from_dict({"anchor": ["a"], "positive": [make_image(9)]}).cast_column("positive", Image())
    mine(pair, index, pairs, tmp_path / "mined")
    (row,) = mined(tmp_path / "mined")
    assert {image["bytes"] for image in negatives_of(row)} == set(images[:3])
    assert "Entry images/3 of the index has" in caplog.text

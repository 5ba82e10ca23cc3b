"""Every column of a row is used as its owner means it, or refused."""

import zipfile

import pytest
from datasets import Dataset, Features, Image, Json, List

from hf_unigd.data import ExampleCheck, ExampleDataset, RowError, RowParser, make_examples
from hf_unigd.data.example import iter_images, iter_parts
from hf_unigd.data.features import without_decoding
from hf_unigd.data.formats import FORMATS, check_columns
from tiny_models import make_image


A, B, C = (make_image(place) for place in range(3))
USER = [{"role": "user", "content": "What is <image>?"}]
CHAT = [*USER, {"role": "assistant", "content": "a cat"}]
MATCH = [[{"role": "user", "content": "a match"}]]


def parse(row, **kwargs):
    return RowParser(lambda text: len(text.split()), **kwargs)(row, 7)


def contents(sequence):
    """The texts and images of a sequence, in order."""
    return [part[part["type"]] for _, part in iter_parts(sequence)]


def test_every_format_has_a_parser():
    assert RowParser(len)._parsers.keys() == {each.name for each in FORMATS}


@pytest.mark.parametrize("images", [{"image": A}, {"images": [A]}, {"images": A}])
def test_trl_and_llava_name_their_images_in_both_ways(images):
    turns = [{"from": "human", "value": "What is <image>?"}, {"from": "gpt", "value": "a cat"}]
    for row in ({"messages": CHAT}, {"conversations": turns}):
        example = parse({**row, **images})
        assert contents(example.anchor) == ["What is", A, "?"]
        assert example.target == "a cat"


@pytest.mark.parametrize(
    ("columns", "negatives"),
    [
        ({"negative": "x"}, [["x"]]),
        ({"negative": ["x"]}, [["x"]]),
        ({"negative": ["x", B]}, [["x", B]]),
        ({"negative": "x", "negative_1": "y", "negative_2": B}, [["x"], ["y"], [B]]),
        ({"negative1": "x", "negative2": "y"}, [["x"], ["y"]]),
        ({"hard_negative": "x"}, [["x"]]),
        ({"hard_negatives": ["x", B], "neg": "y"}, [["x"], [B], ["y"]]),
        ({"negatives": ["x", "y"]}, [["x"], ["y"]]),
        ({"negatives": [["x", B], C]}, [["x", B], [C]]),
        ({"negatives": []}, []),
    ],
)
def test_negatives_by_every_name(columns, negatives):
    for row in ({"anchor": "a", "positive": "b"}, {"image": A, "short_caption": "b"}, {"image": A, "caption": "b"}):
        assert [contents(each) for each in parse({**row, **columns}).negatives] == negatives


def test_matches_of_chats_have_images_of_their_own():
    row = {
        "messages": USER,
        "images": [A],
        "positive_messages": [[{"role": "user", "content": "<image> like this"}]],
        "positive_images": [[B]],
        "negative_messages": [[{"role": "user", "content": "no"}], [{"role": "user", "content": "<image>"}]],
        "negative_images": [[], [C]],
    }
    example = parse(row)
    assert contents(example.positive) == [B, "like this"]
    assert [contents(each) for each in example.negatives] == [["no"], [C]]
    single = {**row, "positive_messages": row["positive_messages"][0], "positive_images": [B]}
    assert contents(parse(single).positive) == [B, "like this"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": CHAT, "image": A, "images": [A]}, "both `image` and `images`"),
        (
            {"messages": CHAT, "images": [A], "short_caption": "a"},
            "`short_caption`, which does not go with `messages`",
        ),
        ({"messages": CHAT, "images": [A], "negative": "a"}, "`negative`, which does not go with `messages`"),
        ({"messages": CHAT, "images": [A], "tools": ["a"]}, "`tools`, but tools are not supported"),
        ({"messages": CHAT, "images": [A], "rejected_response": "a"}, "`rejected_response`, but only the answer"),
        ({"anchor": "a", "positive": "b", "long_caption": "c"}, "`long_caption`, which does not go with `anchor`"),
        ({"anchor": "a", "positive": "b", "image": A}, "`image`, which does not go with `anchor` and `positive`"),
        ({"anchor": "a", "positive": "b", "label": 0}, "`label`, but every pair must be a match"),
        ({"anchor": "a", "positive": ["b", "c"]}, "a list of 2 texts in `positive`.*give one per row"),
        ({"anchor": "a", "positive": "b", "negative": ["c", "d"]}, "a list of 2 texts in `negative`.*`negatives`"),
        ({"anchor": "a", "positive": "b", "negative": [A, B]}, "a list of 2 images in `negative`"),
        ({"image": A, "caption": "a", "short_caption": "b"}, "a `caption` beside a `short_caption`"),
        ({"image": A, "caption": "a", "images": [B]}, "`images`, which does not go with `caption` and `image`"),
        ({"image": A, "long_caption": "a " * 30, "negative": "b"}, "negatives, but no short caption, so"),
        ({"messages": CHAT, "images": [A], "negative_messages": MATCH}, "no `positive_messages`"),
        (
            {"messages": CHAT, "images": [A], "positive_messages": MATCH, "positive_images": [[B], [C]]},
            "1 chats in `positive_messages`, but 2 lists",
        ),
        ({"image": A, "caption": "a", "audio": b"b"}, "`audio`, but only images and texts are supported"),
    ],
)
def test_columns_that_would_be_dropped_are_refused(row, message):
    with pytest.raises(RowError, match=f"Row 7 has .*{message}"):
        parse(row)


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (None, "a turn of type NoneType"),
        ("hello", "a turn of type str"),
        ({"content": "a"}, "the role None"),
        ({"role": "tool", "content": "a"}, "the role 'tool'"),
        ({"role": "user", "content": None}, "`content` is a NoneType"),
        ({"role": "user", "content": []}, "a turn without content"),
        ({"role": "user", "content": ["a"]}, "a part of type str"),
        ({"role": "user", "content": [None]}, "a part of type NoneType"),
        ({"role": "user", "content": [{"type": "text"}]}, "a part of type 'text' with no text"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, "a text of type int"),
        ({"role": "user", "content": [{"text": "a"}]}, "a part of type None"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "image": "b.png"}]}, "with 'text' and 'image'"),
        ({"role": "user", "content": [{"type": "image", "image": A, "path": "b.png"}]}, "with 'image' and 'path'"),
        ({"role": "user", "content": "a", "tool_calls": [{}]}, "a turn with `tool_calls`"),
        ({"role": "assistant", "content": "a", "loss": False}, "a turn with `loss`"),
    ],
)
def test_turns_of_another_form_are_refused(turn, message):
    with pytest.raises(RowError, match=f"Row 7 has .*{message}"):
        parse({"messages": [turn, *CHAT[1:]]})


@pytest.mark.parametrize("name", ["messages", "conversations"])
@pytest.mark.parametrize("value", ["hello", {"role": "user"}, 3])
def test_what_is_no_list_of_turns_is_refused(name, value):
    with pytest.raises(RowError, match=f"Row 7 has `{name}` of type"):
        parse({name: value})


def test_columns_that_describe_a_row_are_named_in_the_log(caplog):
    check_columns(["image", "caption", "id", "width", "negative"])
    assert caplog.messages == ["Columns that are not used: id, width."]


@pytest.mark.parametrize("streaming", [False, True])
def test_images_of_a_dataset_are_opened_by_us_at_any_depth(streaming):
    rows = Dataset.from_list([{"image": A, "images": [[B, C]], "caption": "a"}] * 3)
    assert isinstance(rows.features["images"], List)
    plain = without_decoding(rows.to_iterable_dataset() if streaming else rows.select([2, 1]))
    assert plain.features["image"] == Image(decode=False)
    row = next(iter(plain))
    assert row["image"]["bytes"] and row["images"][0][1]["bytes"] and row["caption"] == "a"
    assert rows.features["image"] == Image()


@pytest.mark.parametrize("streaming", [False, True])
def test_turns_of_mixed_types_beside_images_are_still_turns(streaming):
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "a cat", "markdown": {"index": 0}}]
    features = Features({"image": Image(), "conversations": List(Json())})
    rows = Dataset.from_dict({"image": [A], "conversations": [turns]}, features)
    (row,) = without_decoding(rows.to_iterable_dataset() if streaming else rows)
    assert row["image"]["bytes"] and row["conversations"] == turns


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bomb_in_an_image_column_is_a_bad_row(streaming, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 300)  # above 600, Pillow raises
    rows = Dataset.from_dict({"image": [A, make_image(1, (40, 40)), B], "caption": ["a", "b", "c"]})
    rows = rows.to_iterable_dataset() if streaming else rows
    examples = make_examples(rows, RowParser(len, max_image_pixels=500), skip_bad_rows=True)
    assert [example.row for example in examples] == [0, 2]


def test_a_stream_names_files_of_archives_but_no_address_is_fetched(tmp_path):
    A.save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    inside = {"path": f"zip://a.png::{tmp_path}/images.zip", "bytes": None}
    (image,) = iter_images(parse({"image": inside, "caption": "a"}).anchor)
    assert image.tobytes() == A.tobytes()
    with pytest.raises(RowError, match=r"an image at http://localhost/a\.png, which is not fetched"):
        parse({"image": "http://localhost/a.png", "caption": "a"})
    with pytest.raises(RowError, match="an image that cannot be read"):
        parse({"image": f"zip://b.png::{tmp_path}/images.zip", "caption": "a"})


def test_the_check_of_examples_is_part_of_reading_rows(llava):
    rows = Dataset.from_dict({"anchor": ["a", "red " * 200, "b"], "positive": ["c", "d", "red " * 200]})
    check = ExampleCheck(llava[1], max_length=100)
    read = ExampleDataset(rows, RowParser(len), skip_bad_rows=True, check=check)
    assert [example.row for example in read] == [0]
    check = ExampleCheck(llava[1], 100, contrastive=False)
    assert [example.row for example in ExampleDataset(rows, RowParser(len), skip_bad_rows=True, check=check)] == [0, 2]
    with pytest.raises(RowError, match=r"Row 1 has \d+ tokens"):
        list(ExampleDataset(rows, RowParser(len), check=check))


def test_the_check_agrees_with_the_collator_near_the_limit(llava):
    processor = llava[1]
    for words in range(1, 40):
        example = RowParser(len)({"anchor": ["red " * words, A], "positive": "a"}, 0)
        length = processor.process_sequences([example.anchor])["input_ids"].shape[1]
        ExampleCheck(processor, max_length=length)(example)
        with pytest.raises(RowError, match=f"has {length} tokens"):
            ExampleCheck(processor, max_length=length - 1)(example)

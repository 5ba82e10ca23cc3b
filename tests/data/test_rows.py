"""Every accepted row format, every kind of bad row, and the parts and keys of sequences."""

import io
import pickle
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image

from hf_unigd.data import ExampleCheck, RowError, RowParser, make_examples
from hf_unigd.data.example import content_key, image_key, iter_image_parts, iter_images, iter_parts
from hf_unigd.data.formats import check_columns
from tiny_models import make_image


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def parse(row, trust_caption_columns=True, **kwargs):
    return RowParser(lambda text: len(text.split()), trust_caption_columns=trust_caption_columns, **kwargs)(row, 7)


def texts(messages):
    return [part["text"] for _, part in iter_parts(messages) if part["type"] == "text"]


def kinds(messages):
    return [part["type"] for _, part in iter_parts(messages)]


IMAGE = make_image(1)


def test_captions():
    example = parse({"image": IMAGE, "short_caption": "a cat", "long_caption": "a large cat on a mat"})
    assert kinds(example.anchor) == ["image"]
    assert texts(example.positive) == ["a cat"]
    assert example.target == "a large cat on a mat"
    assert example.prompted


@pytest.mark.parametrize(("length", "is_short"), [(29, True), (30, False), (500, False)])
def test_one_caption_is_routed_by_its_length(length, is_short):
    example = parse({"image": IMAGE, "caption": "word " * length})
    assert (example.positive is not None) == is_short
    assert (example.target is not None) != is_short


def test_of_several_captions_one_is_drawn_in_each_epoch():
    row = {"image": IMAGE, "short_caption": ["a", "b", "c"], "long_caption": ["one", "two"]}
    parser = RowParser(len, trust_caption_columns=True, seed=3)
    drawn = [parser(row, 7, epoch) for epoch in range(30)]
    assert {texts(example.positive)[0] for example in drawn} == {"a", "b", "c"}
    assert {example.target for example in drawn} == {"one", "two"}
    assert all([texts(each) for each in one.captions] == [["a"], ["b"], ["c"], ["one"], ["two"]] for one in drawn)
    assert [texts(parser(row, 7, epoch).positive) for epoch in range(30)] == [texts(each.positive) for each in drawn]
    assert [texts(parser(row, 8, epoch).positive) for epoch in range(30)] != [texts(each.positive) for each in drawn]
    weighted = {"image": IMAGE, "caption": ["a", "b", "c"], "caption_weights": [0, 1, 0.5]}
    drawn = [texts(parser(weighted, 7, epoch).positive)[0] for epoch in range(60)]
    assert drawn.count("b") > drawn.count("c") > 0 and "a" not in drawn


def test_the_check_sees_every_caption_of_a_list(llava):
    processor = llava[1]
    parser = RowParser(lambda text: len(text.split()), find_reserved=processor.find_reserved)
    for bad, message in (("an <image> of it", "the reserved token '<image>'"), ("red " * 60, r"has \d+ tokens")):
        rows = [{"image": IMAGE, "caption": ["a", bad, "b", "c", "d", "e", "f", "g"]}]
        with pytest.raises(RowError, match=f"Row 0 {message}|Row 0 has {message}"):
            make_examples(rows, parser, check=ExampleCheck(processor, max_length=60))
    examples = make_examples([{"image": IMAGE, "short_caption": ["a", "bb"]}], RowParser(len))
    assert examples.epoch == 0 and {texts(examples.parser(examples.rows[0], 0, e).positive)[0] for e in range(9)} == {
        "a",
        "bb",
    }


WORDS = {"short": "a cat", "medium": "a " * 29, "long": "a " * 30, "too long": "a " * 41}


@pytest.mark.parametrize("short", [None, *WORDS])
@pytest.mark.parametrize("long", [None, *WORDS])
@pytest.mark.parametrize("trust", [False, True])
def test_a_caption_of_the_wrong_length_for_its_column_is_left_out_beside_another(short, long, trust):
    """VladVA's limits: a short caption has fewer than 30 tokens, and a long one 30 to (here) 40."""
    parser = RowParser(lambda text: len(text.split()), long_caption_max_tokens=40, trust_caption_columns=trust)
    given = {"short_caption": short, "long_caption": long}
    row = {"image": IMAGE, **{column: WORDS[kind] for column, kind in given.items() if kind}}
    if len(row) == 1:
        return
    fits = {"short_caption": {"short", "medium"}, "long_caption": {"long"}}
    if trust:
        fits = dict.fromkeys(given, set(WORDS) - {"too long"})
    used = {column: WORDS[kind].strip() for column, kind in given.items() if kind in fits[column]}
    if not used:
        with pytest.raises(
            RowError, match=r"has a `(short|long)_caption` of \d+ tokens, (not below|below|more than) `"
        ):
            parser(row, 0)
        return
    example = parser(row, 0)
    assert example.target == used.get("long_caption")
    assert (example.positive and texts(example.positive)[0]) == used.get("short_caption")
    assert parser.left_out == len(row) - 1 - len(used)


def test_a_caption_may_be_the_only_answer_of_a_conversation():
    """As in ShareGPT-4V, whose `conversations` are renamed to `long_caption` beside short captions of one's own."""
    turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": "A cat on a mat."}]
    example = parse({"image": IMAGE, "short_caption": "a cat", "long_caption": turns})
    assert example.target == "A cat on a mat." and texts(example.positive) == ["a cat"]
    for wrong, message in ((turns * 2, "2 answers in `long_caption`"), (turns[:1], "0 answers"), ([{}], "from None")):
        with pytest.raises(RowError, match=message):
            parse({"image": IMAGE, "long_caption": wrong})


def test_captions_that_are_left_out_are_counted(caplog):
    parser = RowParser(lambda text: len(text.split()), long_caption_max_tokens=40)
    for place in range(5):
        parser({"image": IMAGE, "short_caption": "a cat", "long_caption": WORDS["too long"]}, place)
    counts = [message.split()[2] for message in caplog.messages]
    assert (
        counts == ["1", "2", "4"]
        and "the `long_caption` of row 3, of 41 tokens, more than `long_caption_max_tokens=40`" in caplog.text
    )


def test_without_a_contrastive_loss_any_length_is_learned():
    parser = RowParser(lambda text: len(text.split()), short_caption_max_tokens=0)
    row = {"image": IMAGE, "short_caption": WORDS["long"], "long_caption": WORDS["short"]}
    assert parser(row, 0).target == "a cat" and parser.left_out == 0


def test_of_a_list_only_captions_of_the_right_length_are_drawn():
    row = {"image": IMAGE, "short_caption": ["a cat", WORDS["long"], "a dog"], "caption_weights": [1, 9, 2]}
    parser = RowParser(lambda text: len(text.split()))
    drawn = [texts(parser(row, 0, epoch).positive)[0] for epoch in range(60)]
    assert drawn.count("a dog") > drawn.count("a cat") > 0 and len(set(drawn)) == 2


def test_sentence_transformers_columns():
    example = parse({"anchor": "a question", "positive": IMAGE, "negative": "no", "negative_1": ["never", IMAGE]})
    assert texts(example.anchor) == ["a question"]
    assert kinds(example.positive) == ["image"]
    assert [kinds(negative) for negative in example.negatives] == [["text"], ["text", "image"]]


def test_chat_with_positives_keeps_the_order_of_slices():
    example = parse(
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "one"}, {"type": "image"}, {"type": "text", "text": "two"}],
                },
                {"role": "assistant", "content": "the answer"},
            ],
            "images": [IMAGE],
            "positive_messages": [[{"role": "user", "content": "a match"}]],
            "negative_messages": [[{"role": "user", "content": "no"}], [{"role": "user", "content": "never"}]],
        }
    )
    assert kinds(example.anchor) == ["text", "image", "text"]
    assert example.target == "the answer"
    assert texts(example.positive) == ["a match"]
    assert len(example.negatives) == 2
    assert example.prompted


def test_trl_columns_are_continued_without_a_prompt():
    messages = [
        {"role": "user", "content": "What is <image> beside <image>?"},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "yes"},
    ]
    example = parse({"messages": messages, "images": [IMAGE, make_image(2)]})
    assert kinds(example.anchor) == ["text", "image", "text", "image", "text", "text", "text"]
    assert (example.target, example.positive, example.prompted) == ("yes", None, False)
    assert example.anchor_sequences("prompt") == [(example.anchor, "yes", False, True)]
    last = parse({"messages": messages, "images": [IMAGE, make_image(2)]}, mask_history=True)
    assert last.anchor_sequences("prompt") == [(last.anchor, "yes", False, False)]
    no_placeholder = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "a cat"}]
    assert kinds(parse({"messages": no_placeholder, "images": [IMAGE]}).anchor) == ["image", "text"]


def test_llava_columns():
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a cat"}]
    example = parse({"image": IMAGE, "conversations": turns})
    assert kinds(example.anchor) == ["image", "text"]
    assert example.target == "a cat"


def test_a_chat_that_ends_with_a_question_is_learned_or_embedded():
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    example = parse({"messages": turns})
    assert example.anchor_sequences("prompt") == [(example.anchor, None, False, True)]
    with pytest.raises(RowError, match="Row 7 has neither an assistant's answer that is learned nor"):
        parse({"messages": turns}, mask_history=True)
    example = parse({"messages": turns, "positive_messages": turns[:1]})
    assert example.anchor_sequences("prompt") == [(example.anchor, None, True, False)]


def test_no_answer_of_a_chat_follows_an_embedding_prompt():
    turns = [{"role": role, "content": role} for role in ("user", "assistant")]
    chat = parse({"messages": turns, "positive_messages": turns[:1]})
    assert chat.anchor_sequences("prompt") == [
        (chat.anchor, "assistant", False, False),
        (chat.anchor, None, True, False),
    ]
    assert chat.anchor_sequences("prompt", embedded=False) == [(chat.anchor, "assistant", False, False)]
    assert chat.anchor_sequences("prompt", learned=False) == [(chat.anchor, None, True, False)]
    assert chat.anchor_sequences("last_slice") == [(chat.anchor, "assistant", True, False)]
    caption = parse({"image": IMAGE, "short_caption": "a", "long_caption": "b"})
    assert caption.anchor_sequences("prompt") == [(caption.anchor, "b", True, False)]


def test_images_in_every_form(tmp_path):
    IMAGE.save(tmp_path / "a.png")
    forms = [
        IMAGE,
        encoded(IMAGE),
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        {"bytes": encoded(IMAGE), "path": None},
    ]
    images = [image for form in forms for image in iter_images(parse({"image": form, "caption": "a cat"}).anchor)]
    images += iter_images(parse({"image": "a.png", "caption": "a cat"}, image_folder=tmp_path).anchor)
    assert len(images) == 6
    assert all((image.mode, image.tobytes()) == ("RGB", IMAGE.convert("RGB").tobytes()) for image in images)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": IMAGE, "caption": "  "}, "an empty `caption`"),
        ({"image": IMAGE, "short_caption": ""}, "an empty `short_caption`"),
        ({"image": IMAGE, "caption": ["a", ""]}, "an empty `caption`"),
        ({"image": IMAGE, "caption": []}, "an empty `caption`"),
        ({"image": IMAGE, "caption": "a", "caption_weights": [1]}, "`caption_weights`, but no list of captions"),
        ({"image": IMAGE, "caption": ["a", "b"], "caption_weights": [1]}, "`caption_weights` that are not 2 numbers"),
        ({"image": IMAGE, "caption": ["a", "b"], "caption_weights": [0, 0]}, "`caption_weights` that are not 2"),
        ({"image": IMAGE, "caption": 3}, "a `caption` of type int"),
        ({"image": IMAGE, "long_caption": "word " * 501}, "`long_caption` of 501 tokens.*long_caption_max_tokens=500"),
        ({"image": IMAGE, "caption": "word " * 501}, "`long_caption` of 501 tokens"),
        ({"image": IMAGE}, r"no usable columns, only \['image'\]"),
        ({"image": None, "caption": "a cat"}, r"no usable columns, only \['caption'\]"),
        ({"image": "/nowhere/a.png", "caption": "a cat"}, "a missing image: there is no file /nowhere/a.png"),
        ({"image": b"no image", "caption": "a cat"}, "a corrupt image: cannot identify"),
        ({"image": encoded(IMAGE)[:200], "caption": "a cat"}, "a corrupt image: .*truncated"),
        ({"image": 3.5, "caption": "a cat"}, "an image of type float"),
        ({"anchor": "", "positive": "a"}, "an empty `anchor`"),
        ({"anchor": [], "positive": "a"}, "an empty `anchor`"),
        ({"messages": []}, "an empty `messages`"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "nothing to learn"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "without a user's turn"),
        (
            {
                "messages": [{"role": "user", "content": "<image> <image>"}, {"role": "assistant", "content": "a"}],
                "images": [IMAGE],
            },
            "2 image placeholders in `messages`, but the number of images is 1",
        ),
        (
            {
                "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b.<image>c."}],
                "images": [IMAGE],
            },
            "images in the last answer",
        ),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "a turn from 'robot'.*'gpt', 'human', 'system'"),
        (
            {
                "messages": [{"role": "user", "content": "a"}],
                "positive_messages": [[{"role": "user", "content": "b"}]] * 2,
            },
            "2 conversations in `positive_messages`",
        ),
        ({"label": 3}, "no usable columns"),
    ],
)
def test_bad_rows_name_themselves_and_the_reason(row, message):
    with pytest.raises(RowError, match=f"(?s)^Row 7 has .*{message}") as error:
        parse(row)
    assert error.value.row == 7 and not str(error.value).endswith("..")


def test_a_row_error_survives_pickling():
    error = RowError(3, "has an empty `caption`.")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.row, copy.reason, str(copy)) == (RowError, 3, error.reason, str(error))


def test_unknown_columns_are_refused_by_name():
    with pytest.raises(ValueError, match=r"\['label', 'pixels'\](?s:.*)image, caption"):
        check_columns(["pixels", "label"])
    rows = Dataset.from_dict({"picture": [1], "words": ["a"]})
    with pytest.raises(ValueError, match="rename_columns"):
        make_examples(rows, RowParser(len))


@pytest.fixture
def rows_with_bad_ones(tmp_path):
    images = []
    for place in range(6):
        file = tmp_path / f"{place}.png"
        make_image(place).save(file)
        images.append(str(file))
    Path(images[4]).write_bytes(b"broken")
    return Dataset.from_dict({"image": images, "caption": ["a", "", "c", "d", "e", "f"]})


def test_bad_rows_stop_before_training(rows_with_bad_ones):
    with pytest.raises(RowError, match="Row 1 has an empty `caption`"):
        make_examples(rows_with_bad_ones, RowParser(len))


def test_bad_rows_are_skipped_and_counted(rows_with_bad_ones, caplog):
    examples = make_examples(rows_with_bad_ones, RowParser(len), skip_bad_rows=True)
    assert [examples[place].row for place in range(len(examples))] == [0, 2, 3, 5]
    assert "Skipped 2 of 6 rows." in caplog.text
    assert "Row 4 has a corrupt image" in caplog.text


def test_streamed_bad_rows_are_skipped_and_counted(rows_with_bad_ones, caplog):
    stream = rows_with_bad_ones.to_iterable_dataset()
    examples = make_examples(stream, RowParser(len), skip_bad_rows=True)
    assert [example.row for example in examples] == [0, 2, 3, 5]
    assert "Skipped (2 so far): Row 4" in caplog.text
    with pytest.raises(RowError, match="Row 1"):
        list(make_examples(stream, RowParser(len)))


def test_no_row_left_is_an_error(rows_with_bad_ones):
    with pytest.raises(ValueError, match="None of the 1 rows"):
        make_examples(rows_with_bad_ones.select([1]), RowParser(len), skip_bad_rows=True)
    with pytest.raises(ValueError, match="no rows"):
        make_examples(rows_with_bad_ones.select([]), RowParser(len))


def test_parts_come_in_order_with_their_roles():
    other = make_image(2)
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": IMAGE}]},
        {"role": "user", "content": []},
        {"role": "assistant", "content": [{"type": "image", "image": other}, {"type": "text", "text": "b"}]},
    ]
    assert [(role, part["type"]) for role, part in iter_parts(messages)] == [
        ("system", "text"),
        ("system", "image"),
        ("assistant", "image"),
        ("assistant", "text"),
    ]
    assert texts(messages) == ["a", "b"]
    assert [id(image) for image in iter_images(messages)] == [id(IMAGE), id(other)]


def test_content_keys_differ_where_content_differs():
    keys = {
        content_key([{"role": "user", "content": content}])
        for content in (
            [{"type": "text", "text": "a"}],
            [{"type": "text", "text": "b"}],
            [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            [{"type": "text", "text": "ab"}],
            [{"type": "image", "image": Image.new("RGB", (2, 3))}],
            [{"type": "image", "image": Image.new("RGB", (3, 2))}],
            [{"type": "text", "text": image_key({"image": Image.new("RGB", (2, 3))})}],
        )
    }
    assert len(keys) == 7


def test_an_image_has_one_key_however_it_is_handed_over(tmp_path):
    file = tmp_path / "a.jpg"
    make_image(1).save(file)
    data = file.read_bytes()
    opened = Image.open(file)
    handed_over = [str(file), data, {"bytes": data, "path": None}, {"bytes": None, "path": str(file)}, opened]
    opened = Image.open(file)
    opened.load()
    handed_over += [opened, opened.copy(), opened.convert("RGBA")]
    keys = {image_key(next(iter_image_parts(parse({"image": each, "caption": "a"}).anchor))) for each in handed_over}
    assert len(keys) == 1
    other = next(iter_image_parts(parse({"image": make_image(2), "caption": "a"}).anchor))
    assert image_key(other) not in keys


@pytest.mark.parametrize(
    "row",
    [
        {"image": encoded(make_image(1)), "long_caption": "A cat. <video> It runs."},
        {"image": encoded(make_image(1)), "short_caption": "a <video> cat"},
        {"anchor": "a cat", "positive": "a dog", "negative_3": "a <video> cat"},
        {"anchor": "a <video> cat", "positive": "a dog"},
        {"messages": [{"role": "user", "content": "what is <video>"}, {"role": "assistant", "content": "a cat"}]},
        {"messages": [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a <video> cat"}]},
    ],
)
def test_reserved_tokens_are_refused_in_every_text_of_a_row(row):
    def find_reserved(text):
        return "<video>" if "<video>" in text else None

    with pytest.raises(RowError, match=r"Row 7 has the reserved token '<video>' in the text .*Remove it from the row"):
        parse(row, find_reserved=find_reserved)
    parse(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"anchor": "a cat", "positive": "a dog", "video": "a.mp4"}, "the column `video`, but only images and texts"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]}, "a part of type 'video'"),
    ],
)
def test_videos_are_refused(row, message):
    with pytest.raises(RowError, match=f"Row 7 has {message}"):
        parse(row)

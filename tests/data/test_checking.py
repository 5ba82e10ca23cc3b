"""The check of all rows before training: what it reads, by whom, and how often."""

import socket
from io import BytesIO

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from accelerate import PartialState
from datasets import Dataset, Features, Image, Value

from hf_unigd import UniGDProcessor
from hf_unigd.data import ExampleCheck, RowError, RowParser, checking, images, make_examples
from hf_unigd.data.lengths import sequence_length
from tiny_models import make_image, make_vlm


FEATURES = Features({"image": Image(), "caption": Value("string")})


@pytest.fixture
def processor():
    return UniGDProcessor(make_vlm().processor)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def encoded(image, **kwargs):
    file = BytesIO()
    image.save(file, "JPEG", **kwargs)
    return file.getvalue()


def make_rows(images, captions=None):
    captions = captions or ["a cat"] * len(images)
    rows = [
        {"image": {"bytes": image, "path": None}, "caption": caption}
        for image, caption in zip(images, captions, strict=True)
    ]
    return Dataset.from_list(rows, features=FEATURES)


GOOD = [encoded(make_image(n)) for n in range(6)]
CUT = GOOD[1][:-40]  # its header is whole


def check(rows, processor, parser=None, **kwargs):
    kwargs.setdefault("check", ExampleCheck(processor))
    return make_examples(rows, parser or RowParser(len), **kwargs)


@pytest.fixture
def opened(monkeypatch):
    """The images that are decoded, and those whose headers are read."""
    calls = {"decoded": 0, "headers": 0}

    def count(name, function):
        def wrapped(*args):
            calls[name] += 1
            return function(*args)

        return wrapped

    monkeypatch.setattr(images, "open_source", count("decoded", images.open_source))
    monkeypatch.setattr(images, "read_size", count("headers", images.read_size))
    return calls


def test_each_level_reads_what_it_says(processor, opened):
    rows = make_rows([GOOD[0], CUT])
    check(rows, processor, check_rows="off")
    assert opened == {"decoded": 0, "headers": 0}
    check(rows, processor)
    assert opened == {"decoded": 0, "headers": 2}
    with pytest.raises(RowError, match="Row 1 has a corrupt image"):
        check(rows, processor, check_rows="full")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_header_tells_the_size_of_the_opened_image(orientation):
    exif = make_image().getexif()
    exif[0x0112] = orientation
    data = encoded(make_image().resize((30, 20)), exif=exif)
    assert images.blank_image(data).size == images.open_image(data).size


@pytest.mark.parametrize(
    ("image", "caption", "message"),
    [
        (b"no image", "a cat", "corrupt image"),
        (GOOD[0], "", "empty `caption`"),
        (GOOD[0], "<image> of a cat", "reserved token"),
        (GOOD[0], "red " * 300, "tokens"),
        (encoded(make_image().resize((900, 900))), "a cat", "900 x 900 pixels"),
    ],
)
def test_the_level_text_finds_all_but_broken_pixels(processor, image, caption, message, caplog):
    parser = RowParser(
        len, long_caption_max_tokens=5000, max_image_pixels=500_000, find_reserved=processor.find_reserved
    )
    rows = make_rows([GOOD[0], image, GOOD[2]], ["a cat", caption, "a dog"])
    settings = {"parser": parser, "check": ExampleCheck(processor, max_length=200)}
    with pytest.raises(RowError, match=f"Row 1 has .*{message}"):
        check(rows, processor, **settings)
    examples = check(rows, processor, skip_bad_rows=True, **settings)
    assert [example.row for example in examples] == [0, 2]
    assert "Skipped: Row 1" in caplog.text and "Skipped 1 of 3 rows." in caplog.text


def test_good_rows_are_a_range_or_an_array(processor):
    assert check(make_rows(GOOD), processor).indices == range(6)
    indices = check(make_rows([CUT, *GOOD]), processor, check_rows="full", skip_bad_rows=True).indices
    assert isinstance(indices, np.ndarray) and indices.tolist() == [1, 2, 3, 4, 5, 6] and indices.itemsize == 1
    with pytest.raises(ValueError, match="None of the 2 rows"):
        check(make_rows([CUT, CUT]), processor, check_rows="full", skip_bad_rows=True)


def test_workers_find_what_one_process_finds(processor):
    rows = make_rows([*GOOD, CUT, *GOOD * 40])
    settings = {"check_rows": "full", "skip_bad_rows": True, "length_of": lambda example: len(str(example.anchor))}
    alone, workers = (check(rows, processor, num_workers=n, **settings) for n in (0, 2))
    assert np.array_equal(alone.indices, workers.indices) and np.array_equal(alone.lengths, workers.lengths)
    with pytest.raises(RowError, match="Row 6 has a corrupt image") as error:
        check(rows, processor, check_rows="full", num_workers=2)
    assert error.value.row == 6


def test_what_was_found_is_kept_until_rows_or_settings_change(processor, opened, cache):
    rows = make_rows([*GOOD, b"no image"])

    def length_of(example):
        return sequence_length(processor, example.anchor, example.target)

    settings = {"skip_bad_rows": True, "length_of": length_of}
    first = check(rows, processor, **settings)
    assert opened["headers"] == 7 and len(list(cache.glob("*.npz"))) == 1
    second = check(rows, processor, **settings)
    assert opened["headers"] == 7
    assert np.array_equal(first.indices, second.indices) and np.array_equal(first.lengths, second.lengths)
    assert second.lengths.min() > 0
    with pytest.raises(RowError, match="Row 6 has a corrupt image"):
        check(rows, processor, length_of=length_of)
    other_prompts = UniGDProcessor(make_vlm().processor, prompts={"image": "In one word"})
    changes = [
        {"rows": rows.select(range(6))},
        {"check_rows": "full"},
        {"length_of": None},
        {"parser": RowParser(len, long_caption_max_tokens=90)},
        {"check": ExampleCheck(processor, max_length=900)},
        {"check": ExampleCheck(other_prompts)},
    ]
    for change in changes:
        before = sum(opened.values())
        check(**{"rows": rows, "processor": processor, **settings, **change})
        assert sum(opened.values()) > before, change


def test_a_damaged_file_of_the_cache_is_written_again(processor, opened, cache, caplog):
    rows = make_rows(GOOD)
    check(rows, processor)
    (file,) = cache.glob("*.npz")
    file.write_bytes(file.read_bytes()[:50])
    check(rows, processor)
    assert opened["headers"] == 12 and "cannot be read" in caplog.text
    check(rows, processor)
    assert opened["headers"] == 12


def test_rows_that_cannot_be_told_apart_are_always_checked(processor, opened):
    rows = make_rows(GOOD)
    for form in (list(rows.cast_column("image", Image(decode=False))), rows.with_transform(lambda batch: batch)):
        for _ in range(2):
            before = sum(opened.values())
            check(form, processor)
            assert sum(opened.values()) == before + 6


def test_a_long_check_says_how_long(processor, monkeypatch, caplog):
    monkeypatch.setattr(checking, "ESTIMATED_AFTER", 100)
    monkeypatch.setattr(checking, "WORTH_SAYING", 0)
    check(make_rows(GOOD * 40), processor)
    assert caplog.text.count("The check of 240 rows will take about 1 minutes more.") == 1


def check_on_rank(rank, port, folder):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
        }.items():
            patch.setenv(name, str(value))
        patch.setattr(checking, "CACHE", folder / f"cache_{rank}")  # of another machine
        PartialState(cpu=True, backend="gloo")  # as the training arguments do
        processor, parsed = UniGDProcessor(make_vlm().processor), []
        parser = RowParser(lambda text: parsed.append(text) or len(text))
        rows = make_rows([*GOOD, b"no image", *GOOD])
        results = [check(rows, processor, parser, skip_bad_rows=True).indices.tolist() for _ in range(2)]
        torch.save((results, len(parsed)), folder / f"{rank}.pt")
        torch.distributed.destroy_process_group()


def test_processes_share_the_check_and_its_result(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(check_on_rank, (port, tmp_path), nprocs=2)
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert [results for results, _ in shares] == [[[0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]] * 2] * 2
    assert [parsed for _, parsed in shares] == [2 * 6, 2 * 7]  # two counts a caption; the second check read no row
    assert not (tmp_path / "cache_1").exists()

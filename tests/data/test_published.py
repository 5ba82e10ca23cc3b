"""The rows of published data sets, as their owners write them: each is loaded from a small file of the real schema.

The schema of each is that of the source which its test names.
"""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import IterableDataset, load_dataset

from hf_unigd.data import ExampleDataset, IterableExampleDataset, RowError, RowParser, SentenceSplitter, load_rows
from hf_unigd.data.example import iter_images, iter_parts
from hf_unigd.data.features import without_decoding
from hf_unigd.data.formats import check_columns
from hf_unigd.data.images import open_image
from published_rows import jpeg, write_tar
from tiny_models import make_image


both = pytest.mark.parametrize("streaming", [False, True])


def examples_of(rows, **settings):
    """All examples, of a stream too, whose columns are checked as before training."""
    if rows.column_names is not None:
        check_columns(rows.column_names)
    parser = RowParser(lambda text: len(text.split()), **settings)
    return list((IterableExampleDataset if isinstance(rows, IterableDataset) else ExampleDataset)(rows, parser))


def texts(sequence):
    return [part["text"] for _, part in iter_parts(sequence or []) if part["type"] == "text"]


def contents(sequence):
    """The texts of a sequence and, for each image, the place of its pixels among the test's JPEGs."""
    known = {open_image(jpeg(seed)).tobytes(): seed for seed in range(12)}
    return [
        part["text"] if part["type"] == "text" else known[part["image"].tobytes()] for _, part in iter_parts(sequence)
    ]


@pytest.fixture
def images(tmp_path):
    """A folder with the JPEGs 0 to 11."""
    for seed in range(12):
        (tmp_path / f"{seed}.jpg").write_bytes(jpeg(seed))
    return tmp_path


@both
@pytest.mark.parametrize(
    ("names", "read"),
    [
        ("cc3m-train-0000.tar", [0, 1, 2]),
        ("cc3m-train-*.tar", [0, 1, 2, 3, 4, 5]),
        ("cc3m-train-{0000..0001}.tar", [0, 1, 2, 3, 4, 5]),
        (["cc3m-train-0001.tar", "cc3m-train-0000.tar"], [3, 4, 5, 0, 1, 2]),
    ],
)
def test_cc3m_as_webdataset(tmp_path, streaming, names, read):
    """https://huggingface.co/datasets/pixparse/cc3m-wds: `jpg`, `json`, `txt`; the loader adds `__key__` and
    `__url__`. The fields of `json` are those of img2dataset."""
    for file, of_file in (("cc3m-train-0000.tar", [0, 1, 2]), ("cc3m-train-0001.tar", [3, 4, 5])):
        samples = {
            f"00000{seed:04d}": {
                "jpg": jpeg(seed),
                "json": json.dumps({"key": str(seed), "caption": f"a cat {seed}", "error_message": None}).encode(),
                "txt": f"a cat {seed}".encode(),
            }
            for seed in of_file
        }
        write_tar(tmp_path / file, samples)
    paths = str(tmp_path / names) if isinstance(names, str) else [str(tmp_path / name) for name in names]
    rows = load_rows(paths, streaming=streaming)
    assert not streaming or rows.num_shards == len(read) // 3
    examples = examples_of(rows)
    assert [contents(example.anchor) for example in examples] == [[seed] for seed in read]
    assert [texts(example.positive) for example in examples] == [[f"a cat {seed}"] for seed in read]
    assert [row["jpg"]["bytes"] for row in without_decoding(rows)] == [jpeg(seed) for seed in read]


@both
def test_img2dataset_as_parquet(tmp_path, streaming):
    """https://github.com/rom1504/img2dataset, `ParquetSampleWriter`: the image's bytes in `jpg`, its caption in `txt`
    and once more among the columns that describe it. A picture that could not be fetched is a row without `jpg`."""
    rows = [{"key": f"{seed}", "caption": "a cat", "txt": "a cat", "url": "u", "jpg": jpeg(seed)} for seed in (0, 1)]
    rows.append({"key": "2", "caption": "a dog", "txt": None, "url": "u", "jpg": None})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "00000.parquet")
    loaded = load_rows(str(tmp_path / "00000.parquet"), streaming=streaming)
    first, second = examples_of(loaded.take(2))
    assert (contents(first.anchor), texts(first.positive), contents(second.anchor)) == ([0], ["a cat"], [1])
    with pytest.raises(RowError, match=r"Row 2 has no usable columns, only .*'caption'"):
        examples_of(loaded)


@both
def test_coyo_for_sugar_is_one_sequence(tmp_path, streaming):
    """COYO's own files hold URLs (https://github.com/kakaobrain/coyo-dataset); these are img2dataset's."""
    meta = json.dumps({"key": "0", "width": 24}).encode()
    samples = {f"{seed:09d}": {"jpg": jpeg(seed), "json": meta, "txt": b"A cat. It sleeps."} for seed in (0, 1)}
    write_tar(tmp_path / "00000.tar", samples)
    rows = load_rows(str(tmp_path / "00000.tar"), streaming=streaming)
    _, example = examples_of(rows, interleaved_captions=True, splitter=SentenceSplitter())
    assert contents(example.anchor) == [1, "A cat. It sleeps."]
    assert (example.positive, example.target, example.prompted) == (None, None, False)
    assert [one.content for one in example.slices][1:] == ["A cat.", "It sleeps."]
    with pytest.raises(RowError, match="nothing to learn"):
        examples_of(rows, interleaved_captions=True)


@both
def test_mmc4(images, streaming):
    """https://github.com/allenai/mmc4: JSON lines; images are matched to a sentence, and listed in any order."""
    info = {"face_detections": None, "matched_sim": 0.3, "raw_url": "http://a"}
    article = {
        "text_list": ["A red cat.", "It sleeps. It wakes.", "Two dogs."],
        "url": "http://page",
        "image_info": [
            {**info, "image_name": "2.jpg", "matched_text_index": 2},
            {**info, "image_name": "0.jpg", "matched_text_index": 0},
            {**info, "image_name": "1.jpg", "matched_text_index": 2},
        ],
        "similarity_matrix": [[0.1, 0.2, 0.3]] * 3,
        "could_have_url_duplicate": 0,
    }
    (images / "docs_shard_0.jsonl").write_text("\n".join([json.dumps(article)] * 2))
    rows = load_rows(str(images / "docs_shard_0.jsonl"), streaming=streaming)
    for example in examples_of(rows, image_folder=images, splitter=SentenceSplitter()):
        assert contents(example.anchor) == [0, "A red cat.", "It sleeps. It wakes.", 2, 1, "Two dogs."]
        assert (example.positive, example.target, example.prompted) == (None, None, False)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text_list": [], "image_info": []}, "`text_list` that is not a list"),
        ({"text_list": ["a", " "], "image_info": []}, "an empty text in `text_list`"),
        ({"text_list": ["a"], "image_info": [{"matched_text_index": 0}]}, "without an `image_name`"),
        ({"text_list": ["a"], "image_info": [{"image_name": "a.jpg", "matched_text_index": 1}]}, "1, but `text_list`"),
        ({"qry": "", "qry_image_path": "", "pos_text": "a"}, "neither a text nor an image in `qry` and `qry_image_"),
        ({"qry": "a", "pos_text": "", "pos_image_path": ""}, "neither a text nor an image in `pos_text`"),
        ({"qry": "a", "pos_text": "<|image_1|><|image_1|>"}, "2 tags <|image_1|> in `pos_text`"),
        ({"qry": "a", "pos_text": "b", "neg_text": ["c"], "neg_image_path": ["", ""]}, "1 texts in `neg_text`, but 2"),
        ({"qry": "a", "pos_text": 3}, "a `pos_text` of type int"),
        ({"image": make_image(0), "txt": "a", "caption": "b"}, "`txt` and `caption`, which are names of the same"),
        ({"jpg": make_image(0), "txt": "a", "messages": []}, "`jpg`, which does not go with `messages`"),
        ({"jpg": make_image(0), "txt": "a", "anchor": "b"}, "`anchor`, which does not go with `txt` and `jpg`"),
    ],
)
def test_bad_rows_say_why(row, message):
    with pytest.raises(RowError, match=f"Row 3 .*{message}".replace("|", r"\|")):
        RowParser(len)(row, 3)


def mmeb_row(**columns):
    names = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
    return {**dict.fromkeys(names, ""), **columns}


@both
def test_mmeb_train(images, streaming):
    """https://huggingface.co/datasets/TIGER-Lab/MMEB-train: Parquet; paths start from the folder that holds `images`,
    what is missing is an empty text. The first row is one of A-OKVQA, the second of VisDial, the third of WebQA, whose
    queries have a tag without an image. VLM2Vec reads them in `src/data/dataset/mmeb_dataset.py`."""
    question = "<|image_1|>\nRepresent the given image with the following question: What is it?\n"
    given = [
        mmeb_row(qry=question, qry_image_path="0.jpg", pos_text="a cat", neg_text="a dog"),
        mmeb_row(
            qry="Represent the given dialogue: Q:is it a cat\nA:yes\n",
            pos_text="<|image_1|>\nRepresent the given image\n",
            pos_image_path="1.jpg",
            neg_image_path="2.jpg",
        ),
        mmeb_row(qry="<|image_1|>\nFind an image that answers: Which?\n", pos_text="a hat", pos_image_path="3.jpg"),
    ]
    pq.write_table(pa.Table.from_pylist(given), images / "train.parquet")
    rows = load_rows(str(images / "train.parquet"), streaming=streaming)
    examples = examples_of(rows, image_folder=images)
    assert [contents(example.anchor) for example in examples] == [
        [0, "Represent the given image with the following question: What is it?"],
        ["Represent the given dialogue: Q:is it a cat\nA:yes"],
        ["Find an image that answers: Which?"],
    ]
    assert [contents(example.positive) for example in examples] == [
        ["a cat"],
        [1, "Represent the given image"],
        [3, "a hat"],
    ]
    assert [[contents(each) for each in example.negatives] for example in examples] == [[["a dog"]], [[2]], []]


def test_mmeb_with_lists_of_negatives(images):
    """VLM2Vec reads rows with several mined negatives in `src/data/dataset/mmeb_neg_dataset.py`, as two lists."""
    row = mmeb_row(qry="a", pos_text="b", neg_text=["c", "", "<|image_1|> d"], neg_image_path=["", "4.jpg", "5.jpg"])
    example = RowParser(len, image_folder=images)(row, 0)
    assert [contents(each) for each in example.negatives] == [["c"], [4], [5, "d"]]


@both
def test_llava_mix665k(images, streaming):
    """https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K, `llava_v1_5_mix665k.json`: a list; ids are texts
    and numbers, rows from ShareGPT have no image, a `model`, and turns with more keys than others."""
    question = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    bare = [
        {"from": "human", "value": "Hello", "text": None, "markdown": None},
        {"from": "gpt", "value": "Good day.", "text": "Good day.", "markdown": {"answer": "a", "index": 0}},
    ]
    given = [
        {"id": "000000033471", "image": "0.jpg", "conversations": question},
        {"id": 2382585, "image": "1.jpg", "conversations": question},
        {"id": "wgByO4Y_0", "model": "", "conversations": bare},
    ]
    (images / "llava_v1_5_mix665k.json").write_text(json.dumps(given))
    rows = load_rows(str(images / "llava_v1_5_mix665k.json"), streaming=streaming)
    examples = examples_of(rows, image_folder=images)
    assert [contents(example.anchor) for example in examples] == [[0, "What is it?"], [1, "What is it?"], ["Hello"]]


@both
def test_sharegpt4v(images, streaming):
    """https://huggingface.co/datasets/Lin-Chen/ShareGPT4V: a list of `id`, `image` (a path) and `conversations`."""
    turns = [{"from": "human", "value": "What do you see?\n<image>"}, {"from": "gpt", "value": "A red cat."}]
    given = [{"id": f"{seed}", "image": f"{seed}.jpg", "conversations": turns} for seed in range(3)]
    (images / "sharegpt4v_instruct.json").write_text(json.dumps(given))
    rows = load_rows(str(images / "sharegpt4v_instruct.json"), streaming=streaming)
    assert not streaming or rows.num_shards == 3
    examples = examples_of(rows, image_folder=images)
    assert [contents(example.anchor) for example in examples] == [["What do you see?", seed] for seed in range(3)]


@both
def test_coco_captions(images, streaming):
    """https://cocodataset.org/#format-data, `captions_train2017.json`: one object with `images` and `annotations`."""
    content = {
        "info": {"year": 2017},
        "licenses": [{"id": 1, "name": "A", "url": "u"}],
        "images": [{"license": 1, "file_name": f"{seed}.jpg", "id": 57870 + seed} for seed in (3, 4)],
        "annotations": [
            {"image_id": 57874, "id": 1, "caption": "a dog"},
            {"image_id": 57873, "id": 2, "caption": "a cat"},
            {"image_id": 57873, "id": 3, "caption": "a red cat"},
        ],
    }
    file = images / "captions_train2017.json"
    file.write_text(json.dumps(content))
    rows = load_rows(str(file), streaming=streaming)
    assert list(rows) == [
        {"image": "3.jpg", "caption": ["a cat", "a red cat"], "image_id": 57873, "caption_id": [2, 3]},
        {"image": "4.jpg", "caption": ["a dog"], "image_id": 57874, "caption_id": [1]},
    ]
    first, second = examples_of(rows, image_folder=images)
    assert contents(first.anchor) == [3] and texts(first.positive)[0] in ("a cat", "a red cat")
    assert (contents(second.anchor), texts(second.positive)) == ([4], ["a dog"])
    content["annotations"][0]["image_id"] = 1
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"captions_train2017.json: it has a caption of the image 1"):
        load_rows(str(file), streaming=streaming)


@both
@pytest.mark.parametrize("column", ["text", "caption"])
def test_image_folder_with_metadata(tmp_path, streaming, column):
    """https://huggingface.co/docs/datasets/image_dataset, "Image captioning"."""
    (tmp_path / "train").mkdir()
    for seed in range(2):
        (tmp_path / "train" / f"{seed}.jpg").write_bytes(jpeg(seed))
    lines = [json.dumps({"file_name": f"{seed}.jpg", column: f"a cat {seed}"}) for seed in range(2)]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(lines))
    rows = load_rows(str(tmp_path), streaming=streaming)
    examples = examples_of(rows)
    assert sorted((contents(each.anchor), texts(each.positive)) for each in examples) == [
        ([0], ["a cat 0"]),
        ([1], ["a cat 1"]),
    ]
    assert len(list(iter_images(examples[0].anchor))) == 1


@both
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
@pytest.mark.parametrize("folder", ["", "test"])
def test_image_folders_are_what_datasets_makes_of_them(tmp_path, streaming, name, folder):
    split = folder or "train"
    place = tmp_path / folder
    (place / "inner").mkdir(parents=True)
    columns = {"file_name": ["inner/0.jpg", "1.jpg"], "class_file_name": ["1.jpg", None], "text": ["a cat", "a dog"]}
    if not name.endswith("csv"):
        columns["view_file_names"] = [["1.jpg", "inner/0.jpg"], []]
    (place / "inner" / "0.jpg").write_bytes(jpeg(0))
    (place / "1.jpg").write_bytes(jpeg(1))
    table = pa.table(columns)
    write = {"jsonl": lambda: table.to_pandas().to_json(place / name, orient="records", lines=True),
             "csv": lambda: table.to_pandas().to_csv(place / name, index=False),
             "parquet": lambda: pq.write_table(table, place / name)}  # fmt: skip
    write[name.partition(".")[2]]()
    own = load_rows(str(tmp_path), split=split, streaming=streaming)
    theirs = load_dataset(str(tmp_path), split=split)
    order = sorted(theirs, key=lambda row: row["text"])
    for row, expected in zip(own, order, strict=True):
        assert row.keys() == expected.keys()
        assert row["image"].tobytes() == expected["image"].tobytes()
        assert (row["class"] is None) == (expected["class"] is None)
        if "view" in row:
            assert [view.tobytes() for view in row["view"]] == [view.tobytes() for view in expected["view"]]


def test_image_folders_stay_in_their_folder(tmp_path):
    for outside in ("../secret.jpg", "/etc/secret.jpg"):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": outside, "text": "a cat"}))
        with pytest.raises(ValueError, match="is outside the folder"):
            load_rows(str(tmp_path))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"text": "a cat"}))
    with pytest.raises(ValueError, match="has no column `file_name`, only text"):
        load_rows(str(tmp_path))


@both
def test_parquet_with_bytes_or_paths(images, streaming):
    forms = {"bytes": [jpeg(0), jpeg(1)], "structs": [{"bytes": jpeg(s), "path": f"{s}.jpg"} for s in range(2)]}
    forms["paths"] = ["0.jpg", "1.jpg"]
    for name, column in forms.items():
        pq.write_table(pa.table({"image": column, "text": ["a cat", "a dog"]}), images / f"{name}.parquet")
        examples = examples_of(load_rows(str(images / f"{name}.parquet"), streaming=streaming), image_folder=images)
        assert [contents(example.anchor) for example in examples] == [[0], [1]]


def test_files_that_cannot_be_read_together(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"one kind of file at a time can be read, not \.jsonl, \.parquet together"):
        load_rows([str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")])
    with pytest.raises(ValueError, match=r"b-\*\.tar"):
        load_rows(str(tmp_path / "b-*.tar"))
    with pytest.raises(ValueError, match=r"a-\{0\.\.3\}\.zip: its name must end in \.json"):
        load_rows(str(tmp_path / "a-{0..3}.zip"))

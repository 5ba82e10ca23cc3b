"""`hf-unigd caption`: what is missing is captioned, images stay what they are, and the output trains."""

import json
import tarfile
from io import BytesIO

import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from transformers import AutoModelForImageTextToText, AutoProcessor

from bulk_cases import arguments, files_of, save_checkpoint, write_jsonl
from hf_unigd import load_checkpoint
from hf_unigd.bulk import caption_dataset
from hf_unigd.bulk.captioners import QUESTIONS, Captioner, Preparation
from hf_unigd.bulk.captioning import _MARKUP
from hf_unigd.cli.main import main
from hf_unigd.data import RowError, load_rows
from hf_unigd.modeling.rendering_unigd import SequenceRenderer
from tiny_adapters import make_adapter
from tiny_blip import save_blip
from tiny_models import FAMILIES, make_image, make_vlm


IMAGES = [make_image(place, (24 + 8 * (place % 3), 20)) for place in range(7)]
JPEG = Features({"image": Image(), "short_caption": Value("string"), "id": Value("int64")})


def jpeg(image):
    """Encoded with losses, so that another encoding would have other bytes."""
    file = BytesIO()
    image.save(file, "JPEG", quality=40)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plain VLM, one of our checkpoints, and images in bytes of which two have captions."""
    folder = tmp_path_factory.mktemp("caption")
    tiny = make_vlm()
    tiny.model.save_pretrained(folder / "vlm")
    tiny.processor.save_pretrained(folder / "vlm")
    save_checkpoint(folder / "model")
    rows = {
        "image": [{"bytes": jpeg(image), "path": None} for image in IMAGES],
        "short_caption": ["a red cat", None, "", "two dogs", None, None, None],
        "id": list(range(7)),
    }
    Dataset.from_dict(rows, JPEG).save_to_disk(str(folder / "rows"))
    return folder


def call(folder, output, **kwargs):
    kwargs = {
        "model": folder / "vlm",
        "dataset_name": folder / "rows",
        "kind": "short",
        "output": output,
        "batch_size": 2,
        "rows_per_part": 3,
        "max_new_tokens": 4,
        **kwargs,
    }
    return ["caption", *arguments(**kwargs)]


def opened(folder):
    return [row["image"].convert("RGB") for row in load_rows(str(folder / "rows"))]


def asked(model, processor, image, question):
    """What a model answers, by transformers' own means."""
    turn = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}
    inputs = processor.apply_chat_template(
        [turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(generated, skip_special_tokens=True).strip()


class Reds(Preparation):
    """The red of the first pixel of each image."""

    def __call__(self, images):
        return [image.getpixel((0, 0))[0] for image in images]

    def length(self, image):
        return image.width


class Scripted(Captioner):
    """Captions each image by what is written for the red of its first pixel."""

    def __init__(self, *captions, fail_after=None):
        self.description = {"model": "scripted"}
        self.batch_size = 2
        self.preparation = Reds()
        self.captions = captions
        self.fail_after = fail_after
        self.seen = []

    def __call__(self, inputs):
        if self.fail_after is not None and len(self.seen) >= self.fail_after:
            raise OSError("The power is out.")
        self.seen += inputs
        return [self.captions[place] for place in inputs]


def numbered(count, **columns):
    """Images that `Scripted` tells apart, with some other columns."""
    images = [PILImage.new("RGB", (8, 8), (place, 0, 0)) for place in range(count)]
    return Dataset.from_dict({"image": images, **columns}).cast_column("image", Image())


def run(captioner, rows, output, kind="short", **kwargs):
    return caption_dataset(captioner, rows, output, kind, rows_per_part=2, show_progress=False, **kwargs)


@pytest.mark.parametrize("settings", [{}, {"num_workers": 2}, {"dataset_streaming": "true", "num_workers": 1}])
def test_what_is_missing_is_captioned_and_images_keep_their_bytes(folder, tmp_path, capsys, settings):
    main(call(folder, tmp_path / "out", **settings))
    assert f"7 rows in {tmp_path / 'out'}" in capsys.readouterr().out
    model = AutoModelForImageTextToText.from_pretrained(folder / "vlm")
    processor = AutoProcessor.from_pretrained(folder / "vlm")
    expected = [asked(model, processor, image, QUESTIONS["short"]) for image in opened(folder)]
    expected[0], expected[3] = "a red cat", "two dogs"
    rows = load_rows(str(tmp_path / "out"))
    assert rows["short_caption"] == expected and all(expected)
    assert rows["id"] == list(range(7)) and rows.features == JPEG
    undecoded = rows.cast_column("image", Image(decode=False))
    assert [image["bytes"] for image in undecoded["image"]] == [jpeg(image) for image in IMAGES]
    assert files_of(tmp_path / "out") == ["data/.description.json", *(f"data/part-00000{n}.parquet" for n in range(3))]


def test_our_checkpoints_and_adapters_caption_as_generate_does(folder, tmp_path):
    make_adapter(tmp_path)
    images = opened(folder)
    for name in (folder / "model", tmp_path / "adapter"):
        output = tmp_path / f"{name.name}-long"
        main(call(folder, output, model=name, kind="long"))
        model, processor = load_checkpoint(str(name))
        batch = processor.process_sequences([[images[5]]], padding_side="left")
        generated = model.generate(**batch, max_new_tokens=4, do_sample=False)[0, batch["input_ids"].shape[1] :]
        rows = load_rows(str(output))
        assert rows[5]["long_caption"] == processor.decode(generated, skip_special_tokens=True).strip()
        assert rows[0]["short_caption"] == "a red cat"


def test_a_model_without_a_chat_template_continues_a_text(folder, tmp_path):
    name = save_blip(tmp_path / "blip")
    prompts = {"short": "a photo of", "long": "what we see is"}
    with pytest.raises(SystemExit, match=r"has no chat template.*Give `--prompt`"):
        main(call(folder, tmp_path / "none", model=name, kind="long"))
    model, processor = AutoModelForImageTextToText.from_pretrained(name), AutoProcessor.from_pretrained(name)
    for kind, prompt in prompts.items():
        flags = {} if kind == "short" else {"prompt": prompt}
        main(call(folder, tmp_path / kind, model=name, kind=kind, **flags))
        inputs = processor(images=opened(folder)[4], text=prompt, return_tensors="pt")
        generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected = processor.decode(generated, skip_special_tokens=True).strip()
        assert load_rows(str(tmp_path / kind))[4][f"{kind}_caption"] == expected != ""


def test_the_output_trains(folder, tmp_path):
    main(call(folder, tmp_path / "short"))
    main(call(folder, tmp_path / "both", dataset_name=tmp_path / "short", kind="long"))
    flags = {
        "model_name_or_path": folder / "vlm",
        "dataset_name": tmp_path / "both",
        "output_dir": tmp_path / "run",
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "use_cpu": "true",
        "report_to": "none",
        "save_strategy": "no",
        "trust_caption_columns": "true",  # the long ones of this model are short
    }
    main(["train", *arguments(**flags)])
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_an_interrupted_run_goes_on_and_captions_nothing_twice(tmp_path, caplog):
    captions = [f"cat {place}" for place in range(7)]
    rows, output = numbered(7), tmp_path / "out"
    broken = Scripted(*captions, fail_after=4)
    with pytest.raises(OSError, match="power is out"):
        run(broken, rows, output)
    with pytest.raises(FileNotFoundError, match="doesn't contain any data files"):
        load_rows(str(output))
    with pytest.raises(ValueError, match="`kind` was 'short', now 'long'"):
        run(Scripted(*captions), rows, output, "long")
    whole = Scripted(*captions)
    assert run(whole, rows, output) == 7
    assert sorted(broken.seen + whole.seen) == list(range(7)) and "of 2 rows, 2 are there" in caplog.text
    assert load_rows(str(output))["short_caption"] == captions
    again = Scripted(*captions)
    assert run(again, rows, output) == 7 and not again.seen and "is finished" in caplog.text
    assert run(again, rows, output, overwrite=True) == 7 and len(again.seen) == 7


def test_captions_are_replaced_on_request_and_lists_stay_lists(tmp_path):
    kind = List(Value("string"))
    rows = numbered(3, short_caption=[["a", "b"], [], None]).cast_column("short_caption", kind)
    assert run(Scripted("x", "y", "z"), rows, tmp_path / "missing") == 3
    assert load_rows(str(tmp_path / "missing"))["short_caption"] == [["a", "b"], ["y"], ["z"]]
    run(Scripted("x", "y", "z"), rows, tmp_path / "all", replace_captions=True)
    assert load_rows(str(tmp_path / "all"))["short_caption"] == [["x"], ["y"], ["z"]]


def test_a_column_of_something_else_is_refused(tmp_path):
    turns = [[{"from": "gpt", "value": "A cat."}]]
    with pytest.raises(ValueError, match=r"The column `long_caption` holds .*Rename it, or make texts of it"):
        run(Scripted("a"), numbered(1, long_caption=turns), tmp_path / "out", "long")


def test_captions_that_would_not_train_are_left_out(tmp_path, caplog):
    rows = numbered(5, long_caption=["A dog.", None, "A cat.", None, None])
    captions = ["", "a <|im_end|> b", "an <image>", "  a car ", " \n "]
    assert run(Scripted(*captions), rows, tmp_path / "out") == 3
    written = load_rows(str(tmp_path / "out"))
    assert written["short_caption"] == [None, None, "a car"]
    assert written["long_caption"] == ["A dog.", "A cat.", None]
    assert (
        "The caption of row 1 is left out: 'a <|im_end|> b'" in caplog.text and "Left out 2 of 5 rows" in caplog.text
    )
    with pytest.raises(ValueError, match="None of the 2 rows can be used"):
        run(Scripted("", "</s>"), numbered(2), tmp_path / "none")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_reserved_token_is_markup(family):
    tokens = SequenceRenderer(make_vlm(family).processor).reserved_tokens
    assert tokens and not [token for token in tokens if not _MARKUP.search(f"a cat {token} b")]


def test_paths_stay_paths(tmp_path):
    make_image(1).save(tmp_path / "1.png")
    data = write_jsonl(tmp_path / "rows.jsonl", [{"image": "1.png"}])
    run(Scripted(*["a cat"] * 256), load_rows(data), tmp_path / "out", image_folder=tmp_path)
    assert load_rows(str(tmp_path / "out"))[0] == {"image": "1.png", "short_caption": "a cat"}


def test_rows_of_a_tar_are_captioned_with_all_that_they_have(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for place in range(3):
            image = BytesIO()
            PILImage.new("RGB", (8, 8), (place, 0, 0)).save(image, "PNG")
            for suffix, content in {
                "jpg": image.getvalue(),
                "json": json.dumps({"a": [place, place]}).encode(),
            }.items():
                entry = tarfile.TarInfo(f"{place:04d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, BytesIO(content))
    for streaming in (False, True):
        rows, output = load_rows(str(tmp_path / "a.tar"), streaming=streaming), tmp_path / f"out-{streaming}"
        assert run(Scripted("x", "y", "z"), rows, output) == 3
        before = list(load_rows(str(tmp_path / "a.tar")).cast_column("jpg", Image(decode=False)))
        after = list(load_rows(str(output)).cast_column("jpg", Image(decode=False)))
        assert [row["short_caption"] for row in after] == ["x", "y", "z"]
        assert [row["json"] for row in after] == [row["json"] for row in before]
        assert [row["jpg"]["bytes"] for row in after] == [row["jpg"]["bytes"] for row in before]


def test_columns_of_mixed_types_stay(tmp_path):
    make_image(1).save(tmp_path / "1.png")
    mixed = [[1, "a"], [{"b": 2}, None]]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"image": str(tmp_path / "1.png"), "mixed": value}) for value in mixed))
    for streaming in (False, True):
        output = tmp_path / f"out-{streaming}"
        run(Scripted(*["a cat"] * 256), load_rows(str(data), streaming=streaming), output)
        assert load_rows(str(output))["mixed"] == load_rows(str(data))["mixed"] == mixed


def test_a_file_of_the_same_name_does_not_take_an_images_place(tmp_path, monkeypatch):
    make_image(7).save(tmp_path / "0.png")
    monkeypatch.chdir(tmp_path)
    content = jpeg(make_image(1))
    rows = Dataset.from_dict(
        {"image": [None]}, Features({"image": {"bytes": Value("binary"), "path": Value("string")}})
    )
    rows = rows.select([]).add_item({"image": {"bytes": content, "path": "0.png"}}).cast_column("image", Image())
    run(Scripted(*["a cat"] * 256), rows, tmp_path / "out")
    written = load_rows(str(tmp_path / "out")).cast_column("image", Image(decode=False))
    assert written[0]["image"]["bytes"] == content


def test_bad_rows_stop_with_their_number_or_are_skipped(tmp_path, caplog):
    make_image(1).save(tmp_path / "1.png")
    good = str(tmp_path / "1.png")
    data = write_jsonl(tmp_path / "rows.jsonl", [{"image": good}, {"image": "missing.png"}, {"image": good}])
    captioner = Scripted(*["a cat"] * 256)
    with pytest.raises(RowError, match=r"Row 1 has a missing image: there is no file missing\.png"):
        run(captioner, load_rows(data), tmp_path / "out")
    assert run(captioner, load_rows(data), tmp_path / "out", skip_bad_rows=True) == 2
    assert "Skipped: Row 1" in caplog.text and "Left out 1 of 3 rows" in caplog.text
    chats = Dataset.from_dict({"image": [None, good], "messages": [[{"role": "user", "content": "a"}], None]})
    with pytest.raises(RowError, match="Row 0 is a chat row"):
        run(captioner, chats, tmp_path / "chats")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"photo": ["a"]}, "Captions need a column `image`, and the dataset has photo"),
        ({"image": ["a"], "caption": ["a"]}, r"Rename it: `--rename_columns caption:short_caption`"),
        ({"jpg": ["a"], "caption": ["a"], "txt": ["a"]}, "caption:short_caption txt:original_txt"),
    ],
)
def test_datasets_without_use_are_refused_before_the_model_is_loaded(tmp_path, columns, message):
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(SystemExit, match=message):
        main(call(tmp_path, tmp_path / "out", model="/nowhere", dataset_name=data))
    assert not (tmp_path / "out").exists()


def test_files_of_others_stay(tmp_path):
    for name in ("notes", "data/notes", ".parts/notes"):
        theirs = tmp_path / name.replace("/", "-") / name
        theirs.parent.mkdir(parents=True)
        theirs.write_text("precious")
        output = tmp_path / name.replace("/", "-")
        with pytest.raises(ValueError, match=r"holds (other )?files"):
            run(Scripted("a"), numbered(1), output, overwrite=True)
        assert files_of(output) == [name]

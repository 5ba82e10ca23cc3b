"""`hf-unigd embed`: the vectors are the model's own, whatever embeds them, and nothing is embedded twice."""

import signal
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, load_dataset

from bulk_cases import (
    arguments,
    captioned_images,
    embedding_of,
    environment,
    files_of,
    read_vectors,
    save_checkpoint,
    write_jsonl,
)
from hf_unigd import UniGDForConditionalGeneration, load_checkpoint
from hf_unigd.bulk import embed_dataset
from hf_unigd.cli.main import main
from hf_unigd.data import RowError
from tiny_adapters import SEQUENCES, make_adapter
from tiny_models import make_image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embed")
    save_checkpoint(folder / "model")
    captioned_images().save_to_disk(str(folder / "rows"))
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    """Embeddings of the images and of the captions, each alone."""
    pair = load_checkpoint(str(folder / "model"))
    rows = captioned_images()
    images = embedding_of(*pair, *([row["image"]] for row in rows))
    return images, embedding_of(*pair, *(row["short_caption"].strip() for row in rows))


def call(folder, output, **kwargs):
    kwargs = {
        "model": folder / "model",
        "dataset_name": folder / "rows",
        "dataset_test_split": "train",
        "output": output,
        "batch_size": 2,
        "rows_per_part": 3,
        **kwargs,
    }
    return ["embed", *arguments(**kwargs)]


@pytest.mark.parametrize("settings", [{}, {"num_workers": 2}, {"dataset_streaming": "true", "num_workers": 1}])
def test_vectors_are_the_models_own_and_rows_stay_in_order(folder, expected, tmp_path, capsys, settings):
    output = tmp_path / "vectors.parquet"
    main(call(folder, output, columns=["anchor", "positive"], keep_columns="id", **settings))
    assert f"10 rows of embeddings of width 32 in {output}" in capsys.readouterr().out
    for column, vectors in zip(("anchor_embedding", "positive_embedding"), expected, strict=True):
        torch.testing.assert_close(read_vectors(output, column), vectors, atol=1e-5, rtol=0)
    table = pq.read_table(output)
    assert table.schema.names == ["row", "id", "anchor_embedding", "positive_embedding"]
    assert table.schema.field("anchor_embedding").type == pa.list_(pa.float32(), 32)
    assert table["row"].to_pylist() == list(range(10))
    assert table["id"].to_pylist() == [f"id-{place}" for place in range(10)]
    assert files_of(tmp_path) == ["vectors.parquet"]
    loaded = load_dataset("parquet", data_files=str(output), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features["anchor_embedding"].length == 32


KILLED = """
import os, signal, sys
from hf_unigd import UniGDForConditionalGeneration
from hf_unigd.cli.main import main
calls, embed = [], UniGDForConditionalGeneration.embed
def embed_and_die(self, **batch):
    calls.append(1)
    if len(calls) == 6:  # of two batches a part
        os.kill(os.getpid(), signal.SIGKILL)
    return embed(self, **batch)
UniGDForConditionalGeneration.embed = embed_and_die
main(sys.argv[1:])
"""


@pytest.fixture
def embedded(monkeypatch):
    """Numbers of sequences that are embedded."""
    counts, embed = [], UniGDForConditionalGeneration.embed

    def count(self, **batch):
        counts.append(len(batch["spans"]))
        return embed(self, **batch)

    monkeypatch.setattr(UniGDForConditionalGeneration, "embed", count)
    return counts


def test_a_killed_run_goes_on_and_embeds_nothing_twice(folder, expected, tmp_path, caplog, embedded):
    output = tmp_path / "vectors.parquet"
    command = call(folder, output)
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], env=environment(), capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not output.exists() and len(list(tmp_path.glob(".vectors.parquet.parts/part-*.parquet"))) == 2
    with pytest.raises(SystemExit, match=r"`keep_columns` was \[\], now \['id'\].*`--overwrite true`"):
        main([*command, "--keep_columns", "id"])
    main(command)
    assert "Going on: of the parts of 3 rows, 2 are there" in caplog.text
    assert sum(embedded) == 4
    torch.testing.assert_close(read_vectors(output), expected[0], atol=1e-5, rtol=0)

    written = output.stat().st_mtime_ns
    main(command)
    assert sum(embedded) == 4 and output.stat().st_mtime_ns == written and "is finished" in caplog.text
    main([*command, "--overwrite", "true"])
    assert sum(embedded) == 14 and files_of(tmp_path) == ["vectors.parquet"]


def test_a_stream_that_broke_goes_on(folder, expected, tmp_path, embedded, monkeypatch):
    output = tmp_path / "vectors.parquet"
    command = call(folder, output, dataset_streaming="true")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="The power is out"):
        patch.setattr(UniGDForConditionalGeneration, "embed", failing_after(3))
        main(command)
    embedded.clear()
    main(command)
    assert sum(embedded) == 7  # one part of three rows was there
    torch.testing.assert_close(read_vectors(output), expected[0], atol=1e-5, rtol=0)


def failing_after(count):
    embed, calls = UniGDForConditionalGeneration.embed, []

    def embed_or_fail(self, **batch):
        calls.append(1)
        if len(calls) > count:
            raise OSError("The power is out.")
        return embed(self, **batch)

    return embed_or_fail


def test_another_model_other_rows_or_settings_are_refused(folder, tmp_path):
    model = save_checkpoint(tmp_path / "model")
    output = tmp_path / "vectors.parquet"
    main(call(folder, output, model=model))
    captioned_images(9).save_to_disk(str(tmp_path / "others"))
    for change, message in {
        "model": "`model` was ",
        "dtype": "`dtype` was 'float32', now 'bfloat16'",
        "dataset_name": r"`num_rows` was 10, now 9; `rows` was '\w+', now '\w+'",
        "rows_per_part": "`rows_per_part` was 3, now 4",
    }.items():
        value = {"model": folder / "model", "dtype": "bfloat16", "dataset_name": tmp_path / "others"}.get(change, 4)
        with pytest.raises(SystemExit, match=message):
            main(call(folder, output, **{"model": model, change: value}))
    other = tmp_path / "other"
    save_checkpoint(other, seed=1)
    for file in other.iterdir():
        file.replace(tmp_path / "model" / file.name)
    with pytest.raises(SystemExit, match="embeds its probe elsewhere now: it has been trained"):
        main(call(folder, output, model=model))


def test_instructions_are_those_of_training_or_of_a_name_or_of_the_row(folder, tmp_path):
    model, processor = load_checkpoint(str(folder / "model"))
    processor.instructions.update(query="Find the dog.", document="Here is a dog.", task="Name it.")
    rows = Dataset.from_dict({"anchor": ["a", "b"], "positive": ["c", "d"], "instruction": [None, "Look."]})

    def vectors(column="anchor", **settings):
        file = tmp_path / "vectors.parquet"
        settings = {"columns": ["anchor", "positive"], "overwrite": True, "show_progress": False, **settings}
        embed_dataset(model, processor, rows, file, **settings)
        return read_vectors(file, f"{column}_embedding")

    def alone(*pairs):
        batches = [processor.process_sequences([text], instruction=instruction) for text, instruction in pairs]
        with torch.no_grad():
            return torch.cat([model.embed(**batch) for batch in batches])

    for name, instruction in {"query": "Find the dog.", "task": "Name it."}.items():
        expected = alone(("a", instruction), ("b", "Look."))
        torch.testing.assert_close(vectors(prompt_name=name), expected, atol=1e-5, rtol=0)
    expected = alone(("c", "Here is a dog."), ("d", "Here is a dog."))
    torch.testing.assert_close(vectors("positive"), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="There is no instruction 'nothing'"):
        vectors(prompt_name="nothing")
    with pytest.raises(ValueError, match="`instructions` was "):
        vectors(prompt_name="task", overwrite=False)


def test_an_adapter_embeds_like_its_model(tmp_path):
    model, processor = make_adapter(tmp_path)
    rows = [{"anchor": SEQUENCES[0]}, {"anchor": "two blue dogs on the green grass"}]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    output = tmp_path / "vectors.parquet"
    main(call(tmp_path, output, model=tmp_path / "adapter", dataset_name=data))
    expected = embedding_of(model.eval(), processor, *(row["anchor"] for row in rows))
    torch.testing.assert_close(read_vectors(output), expected, atol=1e-4, rtol=0)


def test_a_matryoshka_prefix_is_normalised(folder, tmp_path):
    model = save_checkpoint(tmp_path / "model", head_type="linear", embedding_dim=16, matryoshka_dims=[8])
    output = tmp_path / "vectors.parquet"
    main(call(folder, output, model=model, truncate_dim=8))
    pair = load_checkpoint(model)
    whole = embedding_of(*pair, *([row["image"]] for row in captioned_images()))[:, :8]
    expected = torch.nn.functional.normalize(whole, dim=1)
    torch.testing.assert_close(read_vectors(output), expected, atol=1e-5, rtol=0)
    with pytest.raises(SystemExit, match="`truncate_dim=5` was not trained"):
        main(call(folder, tmp_path / "other.parquet", model=model, truncate_dim=5))


def test_rows_of_every_format_are_embedded(llava, tmp_path):
    image = make_image(3)
    image.save(tmp_path / "image.png")
    path = str(tmp_path / "image.png")
    user = [{"role": "user", "content": "<image> what is it"}]
    answered = [*user, {"role": "assistant", "content": "a yellow car"}]
    different = [
        {"image": path, "caption": "grass " * 60},
        {"anchor": "a cat", "positive": "two dogs"},
        {"images": [path], "messages": answered},
        {"images": [path], "messages": user, "positive_messages": [{"role": "user", "content": "a car"}]},
    ]
    names = sorted({name for row in different for name in row})
    rows = Dataset.from_dict({name: [row.get(name) for row in different] for name in names})
    embed_dataset(*llava, rows, tmp_path / "anchors.parquet", show_progress=False)
    anchors = [[image], "a cat", [image, "what is it"], [image, "what is it"]]
    torch.testing.assert_close(
        read_vectors(tmp_path / "anchors.parquet"), embedding_of(*llava, *anchors), atol=1e-5, rtol=0
    )
    with pytest.raises(RowError, match="Row 2 has no match to embed"):
        embed_dataset(*llava, rows, tmp_path / "x.parquet", columns=["positive"], show_progress=False)
    matched = rows.select([0, 1, 3])
    embed_dataset(*llava, matched, tmp_path / "positives.parquet", columns=["positive"], show_progress=False)
    positives = embedding_of(*llava, ("grass " * 60).strip(), "two dogs", "a car")
    torch.testing.assert_close(
        read_vectors(tmp_path / "positives.parquet", "positive_embedding"), positives, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_rows_stop_with_their_number_or_are_skipped(folder, tmp_path, caplog, num_workers):
    make_image(1).save(tmp_path / "good.png")
    good = str(tmp_path / "good.png")
    texts = ["a", "an <image> in a text", "grass " * 2000, "b"]
    rows = [{"image": good}, {"image": "missing.png"}, *({"anchor": text} for text in texts)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    output = tmp_path / "vectors.parquet"
    command = call(folder, output, dataset_name=data, rows_per_part=1, num_workers=num_workers)
    with pytest.raises(SystemExit, match=r"Row 1 has a missing image: there is no file missing\.png"):
        main(command)
    assert len(list(tmp_path.glob(".vectors.parquet.parts/part-*.parquet"))) == 1
    main([*command, "--skip_bad_rows", "true"])
    assert pq.read_table(output)["row"].to_pylist() == [0, 2, 5]
    assert "Skipped 3 of 6 rows" in caplog.text
    none = write_jsonl(tmp_path / "none.jsonl", [rows[1]])
    with pytest.raises(SystemExit, match="None of the 1 rows can be used"):
        main([*call(folder, tmp_path / "x.parquet", dataset_name=none), "--skip_bad_rows", "true"])
    assert files_of(tmp_path) == ["good.png", "none.jsonl", "rows.jsonl", "vectors.parquet"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": "target"}, "`columns` must be some of anchor, positive, got target"),
        ({"keep_columns": "url"}, "there is no column `url`, only id, image, short_caption"),
        ({"keep_columns": "image"}, "`image` is of type Image, and only columns of single values"),
        ({"dataset_streaming": "true", "num_workers": 2}, "`num_workers=2` for a stream"),
    ],
)
def test_arguments_without_sense_are_refused_before_anything_is_written(folder, tmp_path, settings, message):
    with pytest.raises(SystemExit, match=message):
        main(call(folder, tmp_path / "vectors.parquet", **settings))
    assert not list(tmp_path.iterdir())


def test_a_list_of_captions_is_not_one_embedding(llava, tmp_path):
    rows = Dataset.from_dict({"image": [make_image(0)], "caption": [["a cat", "a dog"]]})
    embed_dataset(*llava, rows, tmp_path / "images.parquet", show_progress=False)
    with pytest.raises(RowError, match=r"Row 0 has a list of captions as its `caption`.*leave `positive` out"):
        embed_dataset(*llava, rows, tmp_path / "x.parquet", columns=["positive"], show_progress=False)


def test_files_of_others_stay(llava, tmp_path):
    rows = captioned_images(2)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "theirs.parquet")
    with pytest.raises(ValueError, match="exists, and no such command wrote it"):
        embed_dataset(*llava, rows, tmp_path / "theirs.parquet", overwrite=True, show_progress=False)
    assert pq.read_table(tmp_path / "theirs.parquet").num_rows == 1
    (tmp_path / ".mine.parquet.parts").mkdir()
    (tmp_path / ".mine.parquet.parts" / "notes").write_text("precious")
    with pytest.raises(ValueError, match="holds other files, and no parts of a run"):
        embed_dataset(*llava, rows, tmp_path / "mine.parquet", overwrite=True, show_progress=False)
    assert (tmp_path / ".mine.parquet.parts" / "notes").read_text() == "precious"

"""Several processes share the work, and write what one process writes."""

import json
import subprocess
import sys

import pyarrow.parquet as pq
import torch

from bulk_cases import (
    arguments,
    captioned_images,
    environment,
    files_of,
    read_vectors,
    save_checkpoint,
    write_jsonl,
)
from hf_unigd.cli.main import main
from hf_unigd.data import SliceFeatures, load_rows
from hf_unigd.retrieval.table import EntryTable
from tiny_teachers import save_teachers


def indexed(folder):
    """The entries of an index, in the order of their rows."""
    return EntryTable.open(folder)._table.to_arrow().sort_by("row")


MAP, STREAM = {"num_workers": 1}, {"dataset_streaming": "true"}


def test_two_processes_write_what_one_writes(tmp_path):
    model = save_checkpoint(tmp_path / "model")
    captioned_images().save_to_disk(str(tmp_path / "rows"))
    common = {"model": model, "dataset_name": tmp_path / "rows", "batch_size": 2, "rows_per_part": 3}

    def embed(name, **settings):
        (tmp_path / name).mkdir(exist_ok=True)
        output = tmp_path / name / "vectors.parquet"
        return ["embed", *arguments(**common, dataset_test_split="train", output=output, **settings)]

    def caption(name, **settings):
        flags = arguments(**common, kind="long", max_new_tokens=3, output=tmp_path / name / "captioned", **settings)
        return ["caption", *flags]

    def index(name, **settings):
        return [
            "index",
            *arguments(
                **common, dataset_test_split="train", output=tmp_path / f"{name}_index", id_column="id", **settings
            ),
        ]

    texts = write_jsonl(
        tmp_path / "texts.jsonl", [{"anchor": f"Cat {n}. It naps.", "positive": "x"} for n in range(10)]
    )
    teachers = save_teachers(tmp_path / "teachers")

    def embed_slices(name, **settings):
        own = {"dataset_name": texts, "output": tmp_path / f"slices_{name}"}
        encoders = {each: getattr(teachers, each) for each in ("image_teacher", "text_teacher", "cross_teacher")}
        return ["embed-slices", *arguments(**{**common, **own, **encoders, **settings})]

    commands = [
        make(name, **settings)
        for make in (embed, caption, index)
        for name, settings in (("map", MAP), ("stream", STREAM))
    ]
    commands.append(embed_slices("map", **MAP))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, __file__, json.dumps(commands)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "process 1 of 2" in done.stderr and done.stdout.count("10 rows") == 5  # the first process speaks
    assert done.stdout.count("10 embeddings") == 2
    for command in (embed("one"), caption("one"), index("one"), embed_slices("one")):
        main(command)

    expected, captions = read_vectors(tmp_path / "one/vectors.parquet"), load_rows(str(tmp_path / "one/captioned"))
    for name in ("map", "stream"):
        file = tmp_path / name / "vectors.parquet"
        torch.testing.assert_close(read_vectors(file), expected, atol=1e-5, rtol=0)
        assert pq.read_table(file)["row"].to_pylist() == list(range(10))
        captioned = load_rows(str(tmp_path / name / "captioned"))
        assert captioned["long_caption"] == captions["long_caption"] and captioned["id"] == captions["id"]
        assert files_of(tmp_path / name) == files_of(tmp_path / "one")
    whole, *others = (indexed(tmp_path / f"{name}_index") for name in ("one", "map", "stream"))
    for other in others:
        assert other.drop_columns("embedding") == whole.drop_columns("embedding")
        torch.testing.assert_close(*(torch.tensor(each["embedding"].to_pylist()) for each in (other, whole)))

    # Both processes come upon "It naps.", which is written once.
    two, one = (SliceFeatures.load(tmp_path / f"slices_{name}", teachers) for name in ("map", "one"))
    assert two.rows["slices"][:] == one.rows["slices"][:] and two.features["key"][:].equal(one.features["key"][:])
    torch.testing.assert_close(two.features["features"][:], one.features["features"][:], atol=1e-3, rtol=0)
    assert len(two.features) == 11 and files_of(tmp_path / "slices_map") == files_of(tmp_path / "slices_one")


if __name__ == "__main__":
    for one in json.loads(sys.argv[1]):
        main(one)

"""`hf-unigd mine`: processes share the work, and a run that was killed goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor, load_checkpoint
from hf_unigd.cli.main import main
from hf_unigd.retrieval.index import EmbeddingIndex
from mining_cases import OTHERS, TEXTS, captioned, mined, negatives_of, texts_of
from tiny_models import make_vlm


TESTS = Path(__file__).parents[1]
# Dies at the third search.
KILLED = """
import os, signal, sys
from hf_unigd.cli.main import main
from hf_unigd.retrieval.index import EmbeddingIndex
calls, rank = [], EmbeddingIndex.rank
def rank_and_die(self, *args):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return rank(self, *args)
EmbeddingIndex.rank = rank_and_die
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, an index of captions, and rows, of which two have the same anchor."""
    folder = tmp_path_factory.mktemp("mine")
    tiny = make_vlm()
    UniGDForConditionalGeneration.from_vlm(tiny.model).save_pretrained(folder / "model")
    UniGDProcessor(tiny.processor).save_pretrained(folder / "model")
    texts_of(load_checkpoint(str(folder / "model")), folder / "index", [*TEXTS, *OTHERS])
    rows = captioned()
    rows.select([*range(9), 0]).map(caption_of_last, with_indices=True).save_to_disk(str(folder / "rows"))
    main(call(folder, folder / "expected"))
    return folder


def caption_of_last(row, place):
    return {"short_caption": OTHERS[0]} if place == 9 else {}


def call(folder, output, **kwargs):
    kwargs = {
        "index": folder / "index",
        "dataset_name": folder / "rows",
        "output": output,
        "batch_size": 2,
        "rows_per_part": 3,
        "num_negatives": 2,
        "sampling_strategy": "random",
        "range_max": 8,
        **kwargs,
    }
    return ["mine", *(word for name, value in kwargs.items() for word in (f"--{name}", str(value)))]


def environment():
    paths = [str(TESTS.parent), str(TESTS), str(Path(__file__).parent)]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def files_of(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_the_command_writes_data_and_says_what_it_found(folder, tmp_path, capsys):
    main(call(folder, tmp_path / "mined"))
    printed = capsys.readouterr().out
    assert f"10 rows in {tmp_path / 'mined'}" in printed and "Positive       Negative     Difference" in printed
    rows = mined(tmp_path / "mined")
    assert rows == mined(folder / "expected")
    names = [".description.json", *(f"part-00000{part}.parquet" for part in range(4))]
    assert files_of(tmp_path / "mined") == [f"{kind}/{name}" for kind in (".scores", "data") for name in names]
    assert not {*negatives_of(rows[0]), *negatives_of(rows[9])} & {rows[0]["short_caption"], OTHERS[0]}
    main(call(folder, tmp_path / "other", seed=1))
    assert mined(tmp_path / "other") != rows


def test_two_processes_write_what_one_writes(folder, tmp_path):
    settings = {"map": {"num_workers": 1}, "stream": {"dataset_streaming": "true"}}
    commands = [call(folder, tmp_path / name, **each) for name, each in settings.items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, __file__, json.dumps(commands)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("10 rows in") == 2  # the first process speaks
    for name in settings:
        assert mined(tmp_path / name) == mined(folder / "expected")
        assert files_of(tmp_path / name) == files_of(folder / "expected")


@pytest.fixture
def embedded(monkeypatch):
    """Numbers of sequences that are embedded."""
    counts, embed = [], UniGDForConditionalGeneration.embed

    def count(self, **batch):
        counts.append(len(batch["spans"]))
        return embed(self, **batch)

    monkeypatch.setattr(UniGDForConditionalGeneration, "embed", count)
    return counts


def test_a_killed_run_goes_on_and_does_nothing_twice(folder, tmp_path, caplog, embedded):
    command = call(folder, tmp_path / "mined")
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], env=environment())
    assert killed.returncode == -signal.SIGKILL
    begun = [path for path in files_of(tmp_path / "mined") if "part-" in path]
    assert [path.split("/")[0] for path in begun] == [".anchors"] * 4 + [".parts"] * 2 + [".scores"] * 2
    with pytest.raises(SystemExit, match=r"`seed` was 0, now 1.*`--overwrite true`"):
        main([*command, "--seed", "1"])
    main(command)
    assert "Going on: of the parts of 3 rows, 2 are there" in caplog.text
    assert not embedded
    assert mined(tmp_path / "mined") == mined(folder / "expected")
    assert files_of(tmp_path / "mined") == files_of(folder / "expected")
    written = (tmp_path / "mined/data/part-000000.parquet").stat().st_mtime_ns
    main(command)
    assert "is finished" in caplog.text
    assert (tmp_path / "mined/data/part-000000.parquet").stat().st_mtime_ns == written


def test_a_run_that_broke_while_embedding_goes_on(folder, tmp_path, monkeypatch, embedded):
    command = call(folder, tmp_path / "mined")
    embed = UniGDForConditionalGeneration.embed
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="The power is out"):
        patch.setattr(
            UniGDForConditionalGeneration,
            "embed",
            lambda self, **batch: embed(self, **batch) if sum(embedded) < 14 else failing(),
        )
        main(command)
    embedded.clear()
    main(command)
    assert sum(embedded) == 8  # of ten anchors and ten captions, two parts of three rows were there
    assert mined(tmp_path / "mined") == mined(folder / "expected")


def test_captions_of_a_dataset_are_indexed_mined_and_their_own_entries_known(folder, tmp_path):
    rows = {"model": folder / "model", "dataset_name": folder / "rows", "dataset_test_split": "train"}
    words = [word for name, value in rows.items() for word in (f"--{name}", str(value))]
    renamed = ["--rename_columns", "short_caption:anchor", "image:picture"]
    main(["index", *words, *renamed, "--output", str(tmp_path / "index")])
    main(call(folder, tmp_path / "mined", index=tmp_path / "index", num_negatives=8, range_max=9))
    found = mined(tmp_path / "mined")
    # Rows 0 and 9 have the same image, so that each has two captions.
    captions = {row["short_caption"] for row in found}
    for place, row in enumerate(found):
        own = {row["short_caption"]} if 0 < place < 9 else {TEXTS[0], OTHERS[0]}
        assert len({*negatives_of(row)}) == 8 and {*negatives_of(row)} <= captions - own


def test_another_index_or_model_is_refused(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="The power is out"):
        patch.setattr(EmbeddingIndex, "rank", failing)
        main(call(folder, tmp_path / "mined"))
    texts_of(load_checkpoint(str(folder / "model")), tmp_path / "index", TEXTS)
    with pytest.raises(SystemExit, match="`entries` was 16, now 10; `index` was "):
        main(call(folder, tmp_path / "mined", index=tmp_path / "index"))
    other = make_vlm(seed=1)
    UniGDForConditionalGeneration.from_vlm(other.model).save_pretrained(tmp_path / "model")
    UniGDProcessor(other.processor).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="embeds its probe elsewhere"):
        main(call(folder, tmp_path / "new", model=tmp_path / "model"))
    with pytest.raises(SystemExit, match=r"`max_score=-2\.0` must be at least -1"):
        main(call(folder, tmp_path / "new", max_score=-2))


def failing(*args):
    raise OSError("The power is out.")


if __name__ == "__main__":
    for one in json.loads(sys.argv[1]):
        main(one)

"""`hf-unigd embed-slices` writes the same features on workers, after it was killed, and from any batches."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset

from bulk_cases import arguments, environment, files_of, save_checkpoint
from hf_unigd.bulk import write_slice_features
from hf_unigd.cli.main import main
from hf_unigd.data import ExampleDataset, RowError, RowParser, SentenceSplitter, SliceFeatures, Teachers
from tiny_models import make_image
from tiny_teachers import save_teachers


FILES = ["features.arrow", "rows.arrow", "teachers.json"]


@pytest.fixture(scope="module")
def teacher_args(tmp_path_factory):
    return save_teachers(tmp_path_factory.mktemp("teachers"))


def make_examples(texts, **kwargs):
    rows = Dataset.from_dict(
        {
            "messages": [[{"role": "user", "content": f"<image>{text}"}] for text in texts],
            "images": [[make_image(place % 3)] for place in range(len(texts))],
        }
    )
    return ExampleDataset(rows, RowParser(len, splitter=SentenceSplitter()), **kwargs)


TEXTS = [f"A cat {place % 4}. It sleeps. It sleeps. A dog {place}." for place in range(10)]


@pytest.mark.parametrize("settings", [{}, {"num_workers": 2}, {"batch_size": 3}], ids=str)
def test_places_follow_the_first_occurrence_and_features_are_the_teachers_own(teacher_args, tmp_path, settings):
    examples = make_examples(TEXTS)
    written = write_slice_features(examples, teacher_args, tmp_path / "f", rows_per_part=2, **settings)
    places, contents = {}, []
    for example in examples:
        for one in example.slices:
            if one.key not in places:
                contents.append(one)
            places.setdefault(one.key, len(places))
    expected = [[places[one.key] for one in example.slices] for example in examples]
    assert written.rows["slices"][:] == expected and expected[0][2] == expected[0][3]
    assert written.features["key"][:].tolist() == list(places)
    features = Teachers(teacher_args)(contents).half().numpy()
    np.testing.assert_allclose(written.features["features"][:].numpy(), features, atol=2e-3)
    assert files_of(tmp_path / "f") == FILES


def test_bad_rows_stop_with_their_number_or_have_no_features(teacher_args, tmp_path, caplog):
    texts = ["A cat.", "", "A dog.", "A <image> cat."]
    with pytest.raises(RowError, match=r"^Row 3 has"):
        write_slice_features(make_examples(texts), teacher_args, tmp_path / "f", rows_per_part=1, num_workers=1)
    skipping = make_examples(texts, skip_bad_rows=True)
    written = write_slice_features(skipping, teacher_args, tmp_path / "f", rows_per_part=1)
    assert [len(slices) for slices in written.rows["slices"]] == [2, 1, 2, 0]
    assert "Going on: of the parts of 1 rows, 3 are there" in caplog.text and "Skipped 1 of 4 rows" in caplog.text
    with pytest.raises(ValueError, match="None of the rows can be used"):
        write_slice_features(make_examples(texts[3:], skip_bad_rows=True), teacher_args, tmp_path / "none")


KILLED = """
import os, signal, sys
from hf_unigd.cli.main import main
from hf_unigd.data import Teachers
calls, encode = [], Teachers.encode
def encode_and_die(self, inputs):
    calls.append(1)
    if len(calls) == 4:  # after two of the first part and one of the second
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, inputs)
Teachers.encode = encode_and_die
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_and_encodes_nothing_twice(teacher_args, tmp_path, monkeypatch, caplog):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"anchor": f"A cat {n}. It sleeps.", "positive": "x"}) for n in range(8)))
    teachers = {name: getattr(teacher_args, name) for name in ("image_teacher", "text_teacher", "cross_teacher")}
    model = save_checkpoint(tmp_path / "model")
    common = {"model": model, "dataset_name": rows, "rows_per_part": 2, "batch_size": 2, **teachers}
    command = ["embed-slices", *arguments(**common, output=tmp_path / "f")]
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], env=environment(), capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert files_of(tmp_path / "f") == [
        f".parts/{name}" for name in (".description.json", *(f"part-{n:06d}.parquet" for n in range(2)))
    ]
    with pytest.raises(SystemExit, match="`rows_per_part` was 2, now 3"):
        main([*command, "--rows_per_part", "3"])

    counts, encode = [], Teachers.encode
    monkeypatch.setattr(Teachers, "encode", lambda self, inputs: counts.append(inputs.count) or encode(self, inputs))
    main(command)
    assert "Going on: of the parts of 2 rows, 2 are there" in caplog.text
    assert sum(counts) == 4 and files_of(tmp_path / "f") == FILES
    main(["embed-slices", *arguments(**common, output=tmp_path / "whole")])
    assert sum(counts) == 4 + 9
    resumed, whole = (SliceFeatures.load(tmp_path / name, teacher_args) for name in ("f", "whole"))
    assert resumed.rows["slices"][:] == whole.rows["slices"][:]
    np.testing.assert_allclose(
        resumed.features["features"][:].numpy(), whole.features["features"][:].numpy(), atol=1e-3
    )

    written = (tmp_path / "f/features.arrow").stat().st_mtime_ns
    main(command)
    assert "is finished" in caplog.text and (tmp_path / "f/features.arrow").stat().st_mtime_ns == written

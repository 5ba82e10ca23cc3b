"""What `UniGDTrainer` logs arrives in the trackers of `report_to`: every loss, norm and picture of an evaluation."""

import json
import logging
import struct
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.integrations.integration_utils import rewrite_logs

from hf_unigd.evaluation import figures
from trainer_cases import make_args, make_rows, make_trainer, stream


# What transformers keeps out of the curves of wandb and trackio: single numbers about the whole run.
SUMMARY = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}
LOSSES = {f"{split}/{name}loss" for split in ("train", "eval") for name in ("", "contrastive_", "causal_lm_")}
NORMS = {"train/grad_norm", "train/contrastive_gradient_norm", "train/causal_lm_gradient_norm"}


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "runs"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    found = {(event.step, name): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}
    for name in events.Tags()["images"]:
        found |= {(event.step, name): opened(BytesIO(event.encoded_image_string)) for event in events.Images(name)}
    return found


def read_trackio(folder):
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import MEDIA_DIR

    (run,) = SQLiteStorage.get_runs(folder.name)
    return read_history(SQLiteStorage.get_logs(folder.name, run), lambda value: Path(MEDIA_DIR) / value["file_path"])


def read_wandb(folder):
    from wandb.proto.wandb_internal_pb2 import Record

    (run,) = (folder / "wandb").glob("offline-run-*")
    (file,) = run.glob("*.wandb")
    records = [Record.FromString(data) for data in leveldb_records(file.read_bytes(), header=7)]
    entries = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            entry: dict = {}
            for item in record.history.item:
                name, *rest = item.nested_key
                value = json.loads(item.value_json)
                if rest:  # what describes a picture comes in items of their own
                    entry.setdefault(name, {})[rest[0]] = value
                else:
                    entry[name] = value
            entries.append(entry)
    return read_history(entries, lambda value: run / "files" / value["path"])


def leveldb_records(data, header):
    """The records of a file in the format of LevelDB's log, whose pieces end with its blocks of 32 KB."""
    place, record = header, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def read_history(entries, find_file):
    """The values and pictures of entries, each of which has the step of the trainer as one of its values."""
    found = {}
    for entry in entries:
        for name, value in entry.items():
            if name.partition("/")[0] in ("train", "eval") and name != "train/global_step":
                is_picture = isinstance(value, dict)
                found[entry["train/global_step"], name] = opened(find_file(value)) if is_picture else value
    return found


def opened(file):
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))


READERS = {"tensorboard": read_tensorboard, "trackio": read_trackio, "wandb": read_wandb}


@pytest.fixture(scope="module", autouse=True)
def where(tmp_path_factory):
    """Trackers write to a folder of the tests. trackio reads its own when it is imported."""
    assert "trackio" not in sys.modules, "trackio was imported before its folder was set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_CONSOLE", "off")
        yield


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    return tmp_path


def make_tracked(folder, tracker, **kwargs):
    evaluated = {"eval_rows": make_rows(12), "eval_strategy": "steps", "eval_steps": 2}
    return make_trainer(folder / "out", report_to=[tracker], project=folder.name, **{**evaluated, **kwargs})


@pytest.mark.parametrize("tracker", READERS)
def test_all_that_is_logged_arrives(tracker, folder, monkeypatch):
    pytest.importorskip(tracker)
    drawn = []
    save = figures.save_figure

    def save_and_keep(figure, output, **kwargs):
        save(figure, output, **kwargs)
        drawn.append(opened(output))

    monkeypatch.setattr(figures, "save_figure", save_and_keep)
    trainer = make_tracked(folder, tracker, loss_gradient_norm_steps=1)
    trainer.train()
    if tracker == "wandb":
        import wandb

        wandb.finish()
        wandb.teardown()  # ends its process, which writes the file
    found = READERS[tracker](folder)
    expected = {
        (log["step"], name): value
        for log in trainer.state.log_history
        for name, value in rewrite_logs({name: value for name, value in log.items() if name != "step"}).items()
        if tracker == "tensorboard" or name.removeprefix("train/") not in SUMMARY
    }
    pictures = {place: found.pop(place) for place in [(2, "eval/retrieval"), (4, "eval/retrieval")]}
    assert found.keys() == expected.keys()
    assert {name for _, name in found} >= LOSSES | NORMS
    for place, value in expected.items():
        assert found[place] == pytest.approx(value, rel=1e-6), place
    assert len(drawn) == 2
    for picture, wanted in zip(pictures.values(), drawn, strict=True):
        assert np.array_equal(picture, wanted)


def test_the_picture_shows_the_best_of_the_ranking(folder, monkeypatch):
    """Six of the twelve captions at equal distances, and for each the five images that `predict` ranks first."""
    shown = []

    def keep(rows, file, title):
        shown.extend(rows)
        Image.new("RGB", (2, 2)).save(file)

    monkeypatch.setattr("hf_unigd.trainer.pictures.draw_retrieval", keep)
    rows = make_rows(12)
    # The last two rows are of one image, which either caption finds.
    rows = rows.select([*range(11), 10])
    trainer = make_tracked(folder, "tensorboard", eval_rows=rows)
    trainer.evaluate()
    ranking = trainer.predict(rows).predictions["positive_to_anchor"]
    assert [query for query, _ in shown] == [rows[place]["short_caption"] for place in (0, 2, 4, 6, 8, 11)]
    for place, (_, results) in zip((0, 2, 4, 6, 8, 11), shown, strict=True):
        hits = ranking[place][:5].tolist()
        assert [image.tobytes() for image, _, _ in results] == [rows[hit]["image"].tobytes() for hit in hits]
        assert len(hits) == 5
        assert [right for _, _, right in results] == [hit == min(place, 10) for hit in hits]


def test_predictions_and_streams_have_no_picture(folder):
    trainer = make_tracked(folder, "tensorboard")
    trainer.predict(make_rows(4))
    trainer.evaluate(stream(8))
    names = {name for _, name in read_tensorboard(folder)}
    assert "eval/loss" in names and "eval/retrieval" not in names
    trainer.evaluate()
    assert (0, "eval/retrieval") in read_tensorboard(folder)


def test_several_datasets_have_a_picture_each(folder):
    trainer = make_tracked(folder, "tensorboard", eval_rows={"small": make_rows(4), "large": make_rows(8)})
    trainer.train()
    pictures = {name for (_, name), value in read_tensorboard(folder).items() if isinstance(value, np.ndarray)}
    assert pictures == {"eval/small_retrieval", "eval/large_retrieval"}


def test_nothing_is_drawn_for_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_unigd.trainer.pictures.draw_retrieval", None)
    make_trainer(tmp_path, eval_rows=make_rows(4)).evaluate()


def test_without_matplotlib_the_rest_arrives(folder, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trainer = make_tracked(folder, "tensorboard")
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").addHandler(caplog.handler)
        trainer.train()
    assert "No pictures of retrieval are logged: Figures need matplotlib" in caplog.text
    names = {name for _, name in read_tensorboard(folder)}
    assert names >= LOSSES and "eval/retrieval" not in names


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_trackio_available", lambda: False)
    with pytest.raises(ValueError, match=r"`report_to`: TrackioCallback requires trackio to be installed"):
        make_args(tmp_path, report_to=["trackio"])

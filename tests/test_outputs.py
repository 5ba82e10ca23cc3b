"""What is written is whole or absent, what cannot be written is found by trying, and what is read is named."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from torch.utils.data import DataLoader

from hf_unigd.data import RowError
from hf_unigd.inputs import reading
from hf_unigd.outputs import check_writable, new_folder, remove_unfinished, writing
from hf_unigd.trainer import UniGDTrainingArguments
from hf_unigd.trainer.interruption import last_whole_checkpoint
from hf_unigd.trainer.output_folder import check_output_folder


def test_a_file_is_renamed_at_the_end_and_links_stay(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("old")
    link.symlink_to(file)
    with writing(link) as unfinished:
        unfinished.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new" and link.is_symlink()
    with pytest.raises(KeyError), writing(file) as unfinished:
        unfinished.write_text("half")
        raise KeyError
    assert file.read_text() == "new" and len(list(tmp_path.iterdir())) == 2


def test_what_a_killed_process_left_is_removed_by_name(tmp_path):
    for name in (".rows-1.arrow.7.unfinished", ".notes.7.unfinished", "rows-1.arrow"):
        (tmp_path / name).touch()
    with suppress(SystemExit), writing(tmp_path / "part-1") as unfinished:
        unfinished.mkdir()
        left = unfinished.rename(tmp_path / f".part-1.9{unfinished.suffix}")
        raise SystemExit
    remove_unfinished(tmp_path, "rows-*.arrow", "part-*")
    assert not left.exists()
    assert {path.name for path in tmp_path.iterdir()} == {".notes.7.unfinished", "rows-1.arrow"}
    remove_unfinished(tmp_path / "nowhere", "part-*")


def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="is neither a file nor a folder"), writing(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()


def test_a_new_folder_is_filled_at_the_end_or_not_at_all(tmp_path):
    folder = tmp_path / "a" / "b"
    with pytest.raises(KeyError), new_folder(folder) as unfinished:
        (unfinished / "half").touch()
        raise KeyError
    assert not any(tmp_path.iterdir())
    with new_folder(folder) as unfinished:
        (unfinished / "sub").mkdir()
        (unfinished / "sub" / "file").touch()
    assert [path.name for path in folder.rglob("*")] == ["sub", "file"]
    with pytest.raises(FileExistsError, match="is not empty"), new_folder(folder):
        pass


def test_trying_leaves_nothing(tmp_path):
    check_writable(tmp_path / "a" / "b", "file")
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/x cannot be written: Not a directory"):
        check_writable(tmp_path / "file" / "x")
    with pytest.raises(ValueError, match=r"cannot be written: File name too long"):
        check_writable(tmp_path, "x" * 300)


def test_errors_of_reading_name_the_source():
    with pytest.raises(ValueError, match=r"^a/b: 'bad header'"), reading("a/b"):
        raise KeyError("bad header")
    with pytest.raises(OSError, match=r"^there is no a/b"), reading("a/b"):
        raise OSError("there is no a/b")
    with pytest.raises(ImportError, match=r"^peft"), reading("a/b"):
        raise ImportError("peft")


class Rows:
    def __len__(self):
        return 4

    def __getitem__(self, place):
        raise RowError(place, "has no image.") from KeyError("image")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_raises_the_error_of_the_row(workers):
    with pytest.raises(RowError, match=r"^Row 0 has no image\.$") as raised:
        next(iter(DataLoader(Rows(), num_workers=workers)))
    assert (raised.value.row, raised.value.reason) == (0, "has no image.")


def test_a_run_does_not_write_over_files_of_others(tmp_path):
    (tmp_path / "train.log").touch()
    check_output_folder(tmp_path)
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(ValueError, match=r"holds checkpoint-7, which would be replaced"):
        check_output_folder(tmp_path)
    assert last_whole_checkpoint(tmp_path, removes_others=True) is None
    assert (tmp_path / "checkpoint-7").exists()
    (tmp_path / "config.json").write_text('{"model_type": "unigd"}')
    check_output_folder(tmp_path)


def test_processes_may_try_the_same_missing_folder_at_once(tmp_path):
    """Each of a launcher's processes makes it and removes it again."""
    with ThreadPoolExecutor(8) as pool:
        names = [f"file{number}" for number in range(400)]
        list(pool.map(lambda name: check_writable(tmp_path / "new" / "folder", name), names))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"report_to": "wand"}, "`report_to`: wand is not supported"),
        ({"report_to": "clearml"}, "`report_to`: ClearMLCallback requires 'clearml' to be installed"),
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size=0` must be at least 1"),
        ({"alignment_bandwidth": float("nan")}, "`alignment_bandwidth=nan` must be above 0"),
        ({"gradient_cache_chunk_size": -1}, "`gradient_cache_chunk_size=-1` must be at least 1"),
    ],
)
def test_settings_are_judged_when_they_are_made(settings, message):
    with pytest.raises(ValueError, match=message):
        UniGDTrainingArguments(use_cpu=True, **settings)

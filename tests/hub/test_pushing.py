"""A push sends what a checkpoint is made of, and nothing else that lies in its folder."""

import pytest

from hf_unigd.hub.pushing import left_behind, pushed_files


@pytest.fixture
def folder(llava, tmp_path):
    model, model.processor = llava
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_all_that_a_save_writes_is_pushed(folder):
    written = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert pushed_files(folder) == written
    assert left_behind(folder) == []


def test_what_else_lies_in_the_folder_stays_there(folder):
    written = pushed_files(folder)
    private = [
        ".env",
        "id_rsa",
        "notes.txt",
        "rows.parquet",
        "optimizer.pt",
        "trainer_state.json",
        "training_args.bin",
    ]
    private += ["runs/events.out.tfevents.1", "checkpoint-2/model.safetensors", "secret/config.json", ".git/config"]
    private += ["model.safetensors.bak", "diary.png", "model_of_mine.py"]
    for name in private:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    assert pushed_files(folder) == written
    assert set(left_behind(folder)) == {
        *(name for name in private if "/" not in name),
        *("runs/", "checkpoint-2/", "secret/", ".git/"),
    }


def test_pictures_of_the_card_and_modules_of_sentence_transformers_are_pushed(folder):
    (folder / "README.md").write_text("# A card\n![Hits](retrieval.png) ![Elsewhere](../secret.png)")
    (folder / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}, {"path": "../outside"}]')
    for name in ("retrieval.png", "diary.png", "1_Pooling/config.json", "1_Pooling/notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    assert {"README.md", "retrieval.png", "1_Pooling/config.json"} <= pushed_files(folder)
    assert not {"diary.png", "1_Pooling/notes.txt"} & pushed_files(folder)


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (folder / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"README.md is a link to .*secret, outside the checkpoint"):
        pushed_files(folder)

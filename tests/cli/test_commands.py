"""The commands, run in process on a tiny checkpoint and local rows."""

import json

import pytest
from datasets import Dataset

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.cli.main import COMMANDS, main
from tiny_models import make_image, make_vlm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plain VLM, one of our checkpoints, rows, and a picture."""
    folder = tmp_path_factory.mktemp("cli")
    tiny = make_vlm()
    tiny.model.save_pretrained(folder / "vlm")
    tiny.processor.save_pretrained(folder / "vlm")
    UniGDForConditionalGeneration.from_vlm(tiny.model).save_pretrained(folder / "model")
    UniGDProcessor(tiny.processor).save_pretrained(folder / "model")
    pictures = [make_image(place) for place in range(8)]
    pictures[0].save(folder / "picture.png")
    rows = {"image": pictures, "short_caption": [f"cat {place}" for place in range(8)], "long_caption": ["A cat."] * 8}
    Dataset.from_dict(rows).save_to_disk(str(folder / "rows"))
    return folder


def train_arguments(folder, output, **kwargs):
    arguments = {
        "model_name_or_path": folder / "vlm",
        "dataset_name": folder / "rows",
        "dataset_test_split": "train",
        "output_dir": output,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "use_cpu": "true",
        **kwargs,
    }
    return ["train", *(part for name, value in arguments.items() for part in (f"--{name}", str(value)))]


def test_help_lists_every_command(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"hf-unigd {command}" in capsys.readouterr().out


def test_unknown_commands_name_the_known():
    with pytest.raises(SystemExit, match=r"no command 'dance'.*quickstart, train"):
        main(["dance"])


@pytest.mark.parametrize("adapter", [False, True])
def test_train_then_evaluate_index_search_answer_generate(folder, tmp_path, capsys, adapter):
    flags = {"use_peft": "true", "soft_prompts": "true"} if adapter else {"head_type": "mlp", "embedding_dim": 8}
    main(train_arguments(folder, tmp_path / "out", eval_strategy="steps", eval_steps=1, **flags))
    model = str(tmp_path / "out")
    data = ["--dataset_name", str(folder / "rows"), "--dataset_test_split", "train"]
    main(["evaluate", "--model", model, *data, "--output", str(tmp_path / "metrics.json")])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert 0 <= metrics["anchor_to_positive_recall_at_1"] <= metrics["anchor_to_positive_recall_at_10"] <= 1
    assert metrics["perplexity"] > 1

    index = ["--index", str(tmp_path / "index")]
    main(["index", "--model", model, *data, "--output", str(tmp_path / "index"), "--faiss", "Flat"])
    assert "8 embeddings of width" in capsys.readouterr().out
    picture = ["--image", str(folder / "picture.png")]
    main(["search", *index, *picture, "--k", "3", "--output", str(tmp_path / "hits.png")])
    first = capsys.readouterr().out.splitlines()[0]
    assert "1.000" in first and "row 0" in first and "cat 0" in first
    assert (tmp_path / "hits.png").stat().st_size > 1000
    main(["search", *index, "--query", "cat 3"])
    assert len(capsys.readouterr().out.splitlines()) == 5

    png = ["--output", str(tmp_path / "answer.png")]
    main(["answer", *index, *picture, "--question", "Is it?", "--k", "2", "--max_new_tokens", "4", *png])
    *_, first, second, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("  1  ") and second.startswith("  2  ") and "cat" in second
    assert (tmp_path / "answer.png").stat().st_size > 1000

    main(["generate", "--model", model, *picture, "--max_new_tokens", "4"])
    main(["generate", "--model", model, *picture, "--prompt", "What is it?", "--max_new_tokens", "4"])


def test_train_resumes(folder, tmp_path):
    main(train_arguments(folder, tmp_path, save_steps=1))
    assert (tmp_path / "checkpoint-2").is_dir()
    main(train_arguments(folder, tmp_path, save_steps=1, max_steps=3, resume_from_checkpoint="true"))
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--output_dir", "x", "--dataset_name", "icons"], "model_name_or_path"),
        (["train", "--output_dir", "x", "--model_name_or_path", "m"], "dataset_name"),
        (["search", "--index", "x"], "Give `--query TEXT`"),
        (["generate", "--model", "m"], "Give `--image FILE`"),
        (["search", "--index", "/nowhere", "--query", "a"], "holds no index"),
        (["answer", "--index", "x"], "Give `--question TEXT`"),
        (["index", "--model", "/nowhere", "--dataset_name", "icons"], "/nowhere"),
    ],
)
def test_mistakes_get_a_message_and_no_traceback(arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(arguments)


def test_unknown_yaml_keys_are_named(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("model_name_or_path: m\ndataset_name: icons\nlearning_rat: 1.0e-4\n")
    with pytest.raises(SystemExit, match="learning_rat"):
        main(["train", "--config", str(config)])


def test_a_head_for_a_model_that_has_one_is_refused(folder, tmp_path):
    with pytest.raises(SystemExit, match="already has a head"):
        main(train_arguments(folder, tmp_path, model_name_or_path=folder / "model", head_type="mlp"))


def test_a_missing_picture_is_named(folder):
    with pytest.raises(SystemExit, match=r"no file nothing\.png"):
        main(["generate", "--model", str(folder / "model"), "--image", "nothing.png"])


def test_an_index_is_refused_to_another_model(folder, tmp_path):
    data = ["--dataset_name", str(folder / "rows"), "--dataset_test_split", "train"]
    make = ["index", "--model", str(folder / "model"), *data, "--output", str(tmp_path / "index")]
    main(make)
    tiny = make_vlm(seed=1)
    UniGDForConditionalGeneration.from_vlm(tiny.model).save_pretrained(tmp_path / "other")
    UniGDProcessor(tiny.processor).save_pretrained(tmp_path / "other")
    other = ["--index", str(tmp_path / "index"), "--model", str(tmp_path / "other")]
    for query in (["search", "--query", "cat"], ["answer", "--question", "cat"]):
        with pytest.raises(SystemExit, match=rf"made by {folder}/model, and {tmp_path}/other embeds its probe"):
            main([*query, *other])
    with pytest.raises(SystemExit, match="was begun with other rows or settings"):
        main([*make, "--store_images", "false"])

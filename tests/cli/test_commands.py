"""The commands, run in process on a tiny checkpoint and local rows."""

import json
import re

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, load_from_disk
from PIL import Image

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor, load_checkpoint
from hf_unigd.cli.main import COMMANDS, main
from hf_unigd.retrieval.table import EntryTable
from tiny_models import make_image, make_vlm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plain VLM, one of our checkpoints, rows, and an image."""
    folder = tmp_path_factory.mktemp("cli")
    tiny = make_vlm()
    tiny.model.save_pretrained(folder / "vlm")
    tiny.processor.save_pretrained(folder / "vlm")
    UniGDForConditionalGeneration.from_vlm(tiny.model).save_pretrained(folder / "model")
    UniGDProcessor(tiny.processor).save_pretrained(folder / "model")
    images = [make_image(place) for place in range(8)]
    images[0].save(folder / "image.png")
    rows = {"image": images, "short_caption": [f"cat {place}" for place in range(8)], "long_caption": ["A cat."] * 8}
    Dataset.from_dict(rows).save_to_disk(str(folder / "rows"))
    return folder


def train_arguments(folder, output, **kwargs):
    arguments = {
        "model_name_or_path": folder / "vlm",
        "dataset_name": folder / "rows",
        "dataset_test_split": "train",
        "trust_caption_columns": "true",
        "output_dir": output,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "use_cpu": "true",
        **kwargs,
    }
    return ["train", *(part for name, value in arguments.items() for part in (f"--{name}", str(value)))]


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_lists_every_command(arguments, capsys):
    main(arguments)
    text = capsys.readouterr().out
    assert re.findall(r"^  ([a-z-]+) +[A-Z]", text, re.MULTILINE) == list(COMMANDS)
    assert "--config FILE.yaml" in text and "COMMAND --help" in text
    assert max(map(len, text.splitlines())) <= 120


def test_version(capsys):
    main(["--version"])
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"hf-unigd {command}" in capsys.readouterr().out


def test_unknown_commands_name_the_known():
    with pytest.raises(SystemExit, match=r"no command 'dance'.*quickstart, caption, plan, train"):
        main(["dance"])


@pytest.mark.parametrize("adapter", [False, True])
def test_train_then_evaluate_index_search_answer_generate(folder, tmp_path, capsys, adapter):
    flags = {"use_peft": "true", "soft_prompts": "true"} if adapter else {"head_type": "mlp", "embedding_dim": 8}
    main(train_arguments(folder, tmp_path / "out", eval_strategy="steps", eval_steps=1, **flags))
    checkpoint = str(tmp_path / "out")
    data = ["--dataset_name", str(folder / "rows"), "--dataset_test_split", "train"]
    main(["evaluate", checkpoint, *data, "--output", str(tmp_path / "metrics.json"), "--batch_size", "3"])
    (result,) = json.loads((tmp_path / "metrics.json").read_text())["results"]
    metrics = result["metrics"]
    model, processor = load_checkpoint(checkpoint)
    expected = measured(model, processor, load_from_disk(str(folder / "rows")))
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)

    index = str(tmp_path / "index")
    main(["index", "--model", checkpoint, *data, "--output", index])
    assert f"8 embeddings of width {model.config.embedding_dim} in {index}" in capsys.readouterr().out
    image = ["--image", str(folder / "image.png")]
    main(["search", index, *image, "--k", "3", "--output", str(tmp_path / "hits.png")])
    first = capsys.readouterr().out.splitlines()[0]
    assert "1.000" in first and f"{folder}/rows/train/0" in first and "cat 0" in first
    assert Image.open(tmp_path / "hits.png").width > 300
    main(["search", "--index", index, "--query", "cat 3"])
    assert len(capsys.readouterr().out.splitlines()) == 5

    png = ["--output", str(tmp_path / "answer.png")]
    main(["answer", index, *image, "--question", "Is it?", "--k", "2", "--max_new_tokens", "4", *png])
    *_, first, second, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("  1  ") and second.startswith("  2  ") and "cat" in second
    assert Image.open(tmp_path / "answer.png").width > 300


def measured(model, processor, rows):
    """Metrics of `rows`, one row at a time and without the trainer."""

    def embed(sequence):
        return model.embed(**processor.process_sequences([sequence]))

    images = torch.cat([embed([row["image"]]) for row in rows])
    texts = torch.cat([embed(row["short_caption"]) for row in rows])
    # A row's rank is the number of candidates that are at least as similar as its own.
    similarity = images @ texts.T
    ranks = [(scores >= scores.diagonal()[:, None]).sum(1) for scores in (similarity, similarity.T)]
    losses = [
        model(**processor.process_sequences([[row["image"]]], targets=[row["long_caption"]])).loss for row in rows
    ]
    return {
        **{f"anchor_to_positive_recall_at_{k}": (ranks[0] <= k).float().mean().item() for k in (1, 5)},
        **{f"positive_to_anchor_recall_at_{k}": (ranks[1] <= k).float().mean().item() for k in (1, 5)},
        "perplexity": torch.stack(losses).mean().exp().item(),
    }


def test_generate_decodes_greedily_or_samples(folder, capsys):
    model, processor = load_checkpoint(str(folder / "model"))
    image = Image.open(folder / "image.png")

    def printed(*arguments):
        main(["generate", str(folder / "model"), "--image", str(folder / "image.png"), *arguments])
        return capsys.readouterr().out.strip()

    def generated(sequence, **kwargs):
        batch = processor.process_sequences([sequence], **kwargs)
        tokens = model.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch["input_ids"].shape[1] :]
        return processor.decode(tokens, skip_special_tokens=True).strip()

    length = ("--max_new_tokens", "12")
    captions = generated([image]), printed(*length)
    answers = generated([image, "What is it?"], prompted=False), printed(*length, "--prompt", "What is it?")
    assert captions[0] == captions[1] != "" and answers[0] == answers[1] != captions[0]
    torch.manual_seed(0)
    assert printed(*length, "--temperature", "5") != captions[0]


def test_train_resumes(folder, tmp_path):
    main(train_arguments(folder, tmp_path, save_steps=1))
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    written = state.stat().st_mtime_ns
    main(train_arguments(folder, tmp_path, save_steps=1, max_steps=3, resume_from_checkpoint="true"))
    assert json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3
    assert state.stat().st_mtime_ns == written  # the first two steps were not trained again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--output_dir", "x", "--dataset_name", "icons"], "model_name_or_path"),
        (["train", "--output_dir", "x", "--model_name_or_path", "m"], "dataset_name"),
        (["search", "--index", "x"], "Give `--query TEXT`"),
        (["generate", "--model", "m"], "Give `--image FILE`"),
        (["search", "--index", "/nowhere", "--query", "a"], "holds no index"),
        (["answer", "--index", "x"], "Give `--question TEXT`"),
        (["generate", "m", "--prompt", "a", "--temperature", "-1"], "`temperature=-1.0` must be at least 0"),
        (["quickstart", "--max_steps", "0"], "`max_steps=0` must be at least 1"),
        (["push", "/nowhere", "ada/model"], "/nowhere holds no checkpoint"),
        (["index", "--model", "/nowhere", "--dataset_name", "icons"], "/nowhere"),
    ],
)
def test_mistakes_get_a_message_and_no_traceback(arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(arguments)


def test_a_head_for_a_model_that_has_one_is_refused(folder, tmp_path):
    with pytest.raises(SystemExit, match="already has a head"):
        main(train_arguments(folder, tmp_path, model_name_or_path=folder / "model", head_type="mlp"))


def test_a_missing_image_is_named(folder):
    with pytest.raises(SystemExit, match=r"`--image` has a missing image: there is no file nothing\.png"):
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
    with pytest.raises(SystemExit, match="was made with other settings: `store_images` was True, now False"):
        main([*make, "--store_images", "false"])


def test_an_index_is_filtered_changed_and_exported(folder, tmp_path, capsys):
    rows = load_from_disk(str(folder / "rows"))
    half = len(rows) // 2
    parts = [rows.select(range(half)), rows.select(range(half, len(rows)))]
    for number, part in enumerate(parts):
        part = part.add_column("lang", ["de", "en"] * (len(part) // 2))
        part.save_to_disk(str(tmp_path / f"part{number}"))
    index = str(tmp_path / "index")
    for number, model in enumerate((["--model", str(folder / "model")], [])):  # then the index knows it
        data = ["--dataset_name", str(tmp_path / f"part{number}"), "--dataset_test_split", "train"]
        main(["index", *model, *data, "--output", index])
    assert f"{len(rows)} embeddings" in capsys.readouterr().out
    main(["search", index, "--query", "cat", "--where", "lang = 'de'", "--k", "20", "--hybrid", "true"])
    assert len(capsys.readouterr().out.splitlines()) == len(rows) // 2
    main(["index", "--output", index, "--delete", "lang = 'de'", "--optimize", "true", "--export", f"{index}.parquet"])
    assert f"{len(rows) // 2} entries are deleted" in capsys.readouterr().out
    assert pq.read_table(f"{index}.parquet")["lang"].to_pylist() == ["en"] * (len(rows) // 2)
    main(["index", "--output", index, "--ann", "IVF_FLAT"])
    assert EntryTable.open(index).ann == "IVF_FLAT"
    main(["index", "--output", index, "--ann", "none"])
    assert EntryTable.open(index).ann is None
    with pytest.raises(SystemExit, match=r"Give a dataset to index \(`--dataset_name`\), or `--delete`"):
        main(["index", "--output", index])
    with pytest.raises(SystemExit, match="`--model` is needed: there is no index in"):
        main(["index", "--output", f"{index}2", *data])

"""`hf-unigd explain`, on rows of a file."""

import json
import re

import pytest
import torch
from PIL import Image

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.cli.main import main
from hf_unigd.data import ExampleDataset, RowParser, Teachers, load_rows
from hf_unigd.trainer.losses import StructureLoss
from tiny_models import make_image, make_vlm
from tiny_teachers import save_teachers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain")
    for place in range(3):
        make_image(place).save(folder / f"{place}.png")
    rows = [
        {"messages": [{"role": "user", "content": "A cat.<image>It runs. It jumps."}], "images": ["0.png"]},
        {"messages": [{"role": "user", "content": "<image><image>A dog."}], "images": ["1.png", "2.png"]},
        {"messages": [{"role": "user", "content": " "}], "images": []},
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def teacher_args(folder):
    return save_teachers(folder / "teachers")


def explain(folder, *arguments):
    rows = ("--dataset_name", str(folder / "rows.jsonl"), "--image_folder", str(folder))
    main(["explain", *arguments, *rows, "--output", str(folder / "alignment.png")])


def printed_similarity(capsys):
    return float(re.search(r"similarity (\d\.\d+)", capsys.readouterr().out).group(1))


@pytest.mark.parametrize("choices", [{}, {"normalization": "cosine", "bandwidth": "0.5"}])
def test_the_teachers_similarity_is_the_target_of_training(folder, teacher_args, capsys, choices):
    names = {f"{name}_teacher": getattr(teacher_args, f"{name}_teacher") for name in ("image", "text", "cross")}
    flags = {**names, **{f"alignment_{name}": value for name, value in choices.items()}}
    explain(folder, "0", "1", *(part for name, value in flags.items() for part in (f"--{name}", value)))
    assert Image.open(folder / "alignment.png").size[0] > 200

    examples = ExampleDataset(
        load_rows(str(folder / "rows.jsonl")), RowParser(len, image_folder=folder, splitter=teacher_args.splitter)
    )
    slices = [*examples[0].slices, *examples[1].slices]
    teachers = Teachers(teacher_args)
    loss = StructureLoss(**{name: float(value) if name == "bandwidth" else value for name, value in choices.items()})
    outputs = loss(
        embeddings=torch.eye(2),
        features=teachers(slices),
        modalities=torch.tensor([one.modality for one in slices]),
        starts=torch.tensor([0, 4]),
        lengths=torch.tensor([4, 3]),
        sample_keys=torch.tensor([0, 1]),
        modality_columns=teachers.modality_columns(),
    )
    assert printed_similarity(capsys) == pytest.approx(outputs["alignment_target"].item(), abs=1e-3)


def test_a_models_own_embeddings(folder, capsys):
    tiny = make_vlm("llava")
    torch.manual_seed(0)
    UniGDForConditionalGeneration.from_vlm(tiny.model, head_type="mlp", embedding_dim=8).save_pretrained(folder / "m")
    UniGDProcessor(tiny.processor, embedding_position="last_slice").save_pretrained(folder / "m")
    explain(folder, "0", "0", "--model", str(folder / "m"))
    assert printed_similarity(capsys) == 1.0
    explain(folder, "0", "1", "--model", str(folder / "m"))
    assert printed_similarity(capsys) < 1.0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("0", "3"), r"B: there is no row 3\. The rows of `dataset_name` are numbered 0 to 2"),
        (("-1", "0"), "`a=-1` must be at least 0"),
        (("0", "2"), "B: Row 2 has an empty text in the user's turn"),
    ],
)
def test_bad_rows_are_named_with_their_argument(folder, rows, message):
    with pytest.raises(SystemExit, match=message):
        explain(folder, *rows)

"""Checks that lmms-eval runs our checkpoints through its entry point, in an environment of its own (`make lmms-eval`):
a local task on a tiny checkpoint, two questions at a time; and that `hf-unigd compare` reads what it writes."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from PIL import Image

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from tiny_models import make_image, make_vlm


TASK = """\
task: tiny_questions
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images_of
doc_to_text: !function utils.question_of
doc_to_target: answer
process_results: !function utils.hit
generation_kwargs: {{max_new_tokens: 8, temperature: 0, num_beams: 1}}
metric_list:
  - {{metric: exact, aggregation: mean, higher_is_better: true}}
  - {{metric: said, aggregation: mean, higher_is_better: true}}
"""


@torch.no_grad()
def write_task(folder: Path) -> list[dict]:
    """Saves a tiny checkpoint, and a task with what it answers and how likely answers are. Returns the task's rows."""
    tiny = make_vlm()
    model, processor = UniGDForConditionalGeneration.from_vlm(tiny.model), UniGDProcessor(tiny.processor)
    model.processor = processor
    model.save_pretrained(folder / "model")
    rows = []
    for place in range(5):
        file = folder / f"{place}.png"
        make_image(place).save(file)
        question = f"What is {'the ' * place}cat?"  # of different lengths, which a batch has to pad
        batch = processor.process_sequences([[make_image(place), question]], prompted=False)
        said = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].shape[1] :]
        scored = processor.process_sequences([[make_image(place), question]], ["a red cat"], prompted=False)
        labels = scored["labels"].masked_fill(scored["labels"] == processor.tokenizer.eos_token_id, -100)
        inputs = {name: value for name, value in scored.items() if name not in ("labels", "spans")}
        loss = tiny.model(**inputs, labels=labels).loss.item() * int((labels != -100).sum())
        answer = processor.batch_decode(said, skip_special_tokens=True)[0].strip()
        rows.append({"image": str(file), "question": question, "answer": answer, "log_likelihood": -loss})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tasks").mkdir()
    shutil.copy(Path(__file__).parent / "tasks" / "utils.py", folder / "tasks")
    (folder / "tasks" / "tiny_questions.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    return rows


def check_task(folder: Path) -> None:
    """lmms-eval runs the task by its command, and the answers are those of the model alone."""
    metrics = run_task(folder, "model")
    assert metrics["exact,none"] == metrics["said,none"] == 1.0, metrics


def check_comparison(folder: Path) -> None:
    """What lmms-eval wrote of two models is what `hf-unigd compare` reads."""
    tiny = make_vlm(seed=1)
    tiny.model.save_pretrained(folder / "other")
    tiny.processor.save_pretrained(folder / "other")
    exact = run_task(folder, "other")["exact,none"]
    names = ["model", "other"]
    command = [sys.executable, "-m", "hf_unigd", "compare", *names, "--output", str(folder / "comparison")]
    runs = [str(folder / "out" / name) for name in names]
    subprocess.run([*command, "--lmms_results", *runs], check=True)
    (changes,) = json.loads((folder / "comparison" / "comparison.json").read_text())["changes"].values()
    found = {change["metric"]: change for change in changes}
    assert (found["exact"]["base"], found["exact"]["tuned"]) == (1.0, exact) and exact < 1, found
    assert found["exact"]["low"] <= exact - 1 <= found["exact"]["high"], found  # from the scores of single questions


def run_task(folder: Path, name: str) -> dict:
    """Runs the task on a model in the folder. Returns its metrics."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "unigd", "--model_args", f"pretrained={folder}/{name}"]
    command += ["--tasks", "tiny_questions", "--include_path", str(folder / "tasks"), "--batch_size", "2"]
    subprocess.run([*command, "--output_path", str(folder / "out" / name), "--log_samples"], check=True)
    (file,) = (folder / "out" / name).rglob("*_results.json")
    return json.loads(file.read_text())["results"]["tiny_questions"]


def check_methods(folder: Path, rows: list[dict]) -> None:
    """What no task of lmms-eval asks of chat models today: log-likelihoods, and several rounds."""
    from hf_unigd.evaluation.lmms_model import UniGDLmms

    model = UniGDLmms(str(folder / "model"), batch_size=2)
    model.task_dict = {"task": {"test": rows}}

    def request(*arguments):
        return SimpleNamespace(args=arguments)

    def images_of(row):
        return [Image.open(row["image"])]

    scored = model.loglikelihood(
        [request(row["question"], " a red cat", images_of, place, "task", "test") for place, row in enumerate(rows)]
    )
    for row, (found, _) in zip(rows, scored, strict=True):
        assert math.isclose(found, row["log_likelihood"], rel_tol=1e-4), (found, row)

    def messages_of(row, round_idx=0, previous_output=None, previous_round_info=None):
        text = {"type": "text", "text": row["question"] if not round_idx else "And?"}
        image = {"type": "image", "url": Image.open(row["image"])}
        messages = [{"role": "user", "content": [image, text]}]
        return messages if round_idx == 0 else (messages, round_idx == 2, previous_output, None)

    settings = {"max_new_tokens": 8}
    found = model.generate_until_multi_round([request("", messages_of, settings, 0, "task", "test")])
    assert len(found[0]) == 2 and found[0][0] == rows[0]["answer"], found


if __name__ == "__main__":
    with TemporaryDirectory() as name:
        rows = write_task(Path(name))
        check_methods(Path(name), rows)
        check_task(Path(name))
        check_comparison(Path(name))
    print("lmms-eval runs our checkpoints, and what it writes joins in a comparison.")

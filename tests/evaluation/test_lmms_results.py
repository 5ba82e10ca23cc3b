"""What lmms-eval writes joins in a comparison."""

import json

import numpy as np
import pytest
import yaml

from hf_unigd.cli.main import main
from hf_unigd.evaluation.comparison import compare_results, difference_interval
from hf_unigd.evaluation.lmms_results import read_lmms_results
from hf_unigd.evaluation.scores import Scores
from lmms_files import write_lmms_run


def a_run(folder, right, cider, **settings):
    """VQAv2's accuracy, POPE's, whose entries are dicts, and the CIDEr of captions, which is no mean of numbers."""
    right = np.array(right, dtype=float)
    said = [{"question_id": place, "score": score, "prediction": "yes"} for place, score in enumerate(right)]
    captions = [{"answer": ["a cat"], "pred": "a dog", "image_id": place} for place in range(len(right))]
    tasks = {
        "vqav2_val": {"exact_match": (right.mean(), True, right.tolist()), "submission": ([], None, right.tolist())},
        "pope": {
            "pope_accuracy": (right.mean(), True, said),
            "pope_f1_score": (right.mean() / 2, True, said),
        },
        "nocaps_val": {"nocaps_CIDEr": (cider, True, captions)},
        "mme": {"mme_perception_score": (1487.25, True, said), "wrong": (right.mean(), False, right.tolist())},
    }
    return write_lmms_run(folder, tasks, **settings)


RIGHT = np.random.default_rng(0).random(200) < 0.5
MORE = RIGHT | (np.arange(200) % 5 == 0)


def test_scores_of_single_questions_are_read_where_the_metric_is_their_mean(tmp_path):
    file = a_run(tmp_path, RIGHT, 0.8)
    for path in (file, tmp_path, str(tmp_path)):
        found = {result.benchmark: result for result in read_lmms_results(path)}
        vqa, pope, captions, mme = (found[f"lmms-eval/{task}"] for task in ("vqav2_val", "pope", "nocaps_val", "mme"))
        assert vqa.metrics == {"exact_match": RIGHT.mean()} and vqa.counts == {"questions": 200}
        np.testing.assert_array_equal(vqa.scores["exact_match"].values, RIGHT)  # in the order of the questions
        assert pope.scores.keys() == {"pope_accuracy"} and pope.metrics["pope_f1_score"] == RIGHT.mean() / 2
        assert captions.metrics == {"nocaps_CIDEr": 0.8} and not captions.scores
        assert mme.metrics["mme_perception_score"] == 1487.25
        assert mme.better == {"mme_perception_score": "higher", "wrong": "lower"}
        assert vqa.dataset["path"] == "lmms-lab-encoder/vqav2_val" and "you/model" in vqa.source
    file = a_run(tmp_path / "other", RIGHT, 0.8, samples=False)
    assert not any(result.scores for result in read_lmms_results(file))


def test_changes_have_intervals_where_there_are_scores_and_a_direction(tmp_path):
    runs = [
        read_lmms_results(a_run(tmp_path / str(cider), right, cider)) for right, cider in ((RIGHT, 0.8), (MORE, 1.1))
    ]
    changes = {change.metric: change for change in compare_results(*runs)}
    vqa = changes["exact_match"]
    assert (vqa.section, vqa.verdict) == ("Generation", "gained")
    assert (vqa.low, vqa.high) == difference_interval(Scores(RIGHT.astype(float)), Scores(MORE.astype(float)))
    assert changes["pope_accuracy"].verdict == "gained" and changes["wrong"].verdict == "lost"
    cider = changes["nocaps_CIDEr"]
    assert (cider.base, cider.tuned, cider.low, cider.verdict) == (0.8, 1.1, None, "undecided")


def test_the_newest_results_of_a_task_count(tmp_path):
    a_run(tmp_path, MORE, 1.1, date="20261127_000000")
    a_run(tmp_path, RIGHT, 0.8, date="20261126_235959")
    write_lmms_run(tmp_path, {"gqa": {"exact_match": (1.0, True, [1.0])}}, date="20261125_000000")
    found = {result.benchmark: result.metrics for result in read_lmms_results(tmp_path)}
    assert found["lmms-eval/nocaps_val"] == {"nocaps_CIDEr": 1.1} and found["lmms-eval/gqa"] == {"exact_match": 1.0}


def test_what_is_no_run_of_one_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a results file of lmms-eval"):
        read_lmms_results(tmp_path)
    with pytest.raises(ValueError, match="neither a results file of lmms-eval"):
        read_lmms_results(tmp_path / "a_results.json")
    file = a_run(tmp_path, RIGHT, 0.8)
    a_run(tmp_path, RIGHT, 0.8, model="you/other")
    with pytest.raises(ValueError, match="of several models: you/model, you/other"):
        read_lmms_results(tmp_path)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"_results\.json: Expecting"):
        read_lmms_results(file)
    file.write_text("{}")
    with pytest.raises(ValueError, match="no results file of lmms-eval"):
        read_lmms_results(file)
    file = a_run(tmp_path / "cut", RIGHT, 0.8)
    samples = file.with_name(file.name.replace("_results.json", "_samples_pope.jsonl"))
    samples.write_text(samples.read_text()[:-9])
    with pytest.raises(ValueError, match=r"_samples_pope\.jsonl"):
        read_lmms_results(file)


def test_runs_of_other_questions_are_not_compared(tmp_path):
    base = read_lmms_results(a_run(tmp_path / "a", RIGHT, 0.8))
    shorter = read_lmms_results(a_run(tmp_path / "b", MORE[:100], 0.8))
    with pytest.raises(ValueError, match=r"lmms-eval/vqav2_val: .*`questions` 200 and 100"):
        compare_results(base, shorter)


def test_the_command_takes_them_alone(tmp_path, capsys):
    a_run(tmp_path / "base", RIGHT, 0.8)
    a_run(tmp_path / "tuned", MORE, 1.1, model="you/tuned")
    call = ["compare", "you/model", "you/tuned", "--output", str(tmp_path / "out"), "--lmms_results"]
    given = [str(tmp_path / "base"), str(tmp_path / "tuned")]
    main(call + given)
    main(call + given)  # into the same folder
    page = (tmp_path / "out" / "README.md").read_text()
    assert page.split("---\n\n")[-1].strip() in capsys.readouterr().out
    assert "### Generation" in page and "### Retrieval" not in page
    assert "| lmms-eval/nocaps_val | nocaps_CIDEr | 0.80 | 1.10 | +0.30 | - | undecided |" in page
    assert "| lmms-eval/mme | mme_perception_score | 1487 | 1487 | +0 | - | undecided |" in page
    assert "**Lost**: lmms-eval/mme wrong." in page and "- lmms-eval, `you/model`: you/model, " in page
    (index,) = yaml.safe_load(page.split("---\n")[1])["model-index"]
    pope = next(each for each in index["results"] if each["dataset"]["type"] == "lmms-lab-encoder/pope")
    assert pope["task"]["type"] == "image-text-to-text"
    changes = json.loads((tmp_path / "out" / "comparison.json").read_text())["changes"]["you/tuned"]
    assert {change["section"] for change in changes} == {"Generation"}
    with pytest.raises(SystemExit, match="names 1 folders or files, and 2 models are compared"):
        main(call + given[:1])
    with pytest.raises(SystemExit, match="names a folder or file twice"):
        main([*call, given[0], given[0]])

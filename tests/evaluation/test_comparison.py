"""Comparison of models: intervals against theory, verdicts, and the page that the command writes."""

import json

import matplotlib.axes
import numpy as np
import pytest
import yaml
from datasets import Dataset
from PIL import Image

import benchmark_files
from hf_unigd.cli.main import main
from hf_unigd.evaluation.comparison import Change, compare_results, difference_interval, format_value
from hf_unigd.evaluation.figures import draw_changes, is_figure
from hf_unigd.evaluation.report import write_report
from hf_unigd.evaluation.results import Result
from hf_unigd.evaluation.scores import Scores
from tiny_models import make_image, make_vlm


def binary(count, rate, seed=0):
    return (np.random.default_rng(seed).random(count) < rate).astype(float)


def test_the_interval_is_that_of_the_normal_approximation():
    base, tuned = binary(1000, 0.5), binary(1000, 0.6, seed=1)
    low, high = difference_interval(Scores(base), Scores(tuned))
    mean, error = (tuned - base).mean(), (tuned - base).std() / np.sqrt(1000)
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.006)


def test_pairs_are_drawn_together():
    """A model that is right on the same items and on a few more differs surely, however uncertain both metrics are."""
    base = binary(200, 0.5)
    tuned = base.copy()
    tuned[np.flatnonzero(base == 0)[:10]] = 1
    low, high = difference_interval(Scores(base), Scores(tuned))
    assert 0 < low < 0.05 < high < 0.09
    assert difference_interval(Scores(base), Scores(base)) == (0, 0)


def test_items_of_a_group_are_drawn_together():
    """Five copies of each item say no more than one."""
    base, tuned = binary(200, 0.5), binary(200, 0.6, seed=1)
    groups = np.repeat(np.arange(200), 5)
    single = difference_interval(Scores(base), Scores(tuned))
    copied = [Scores(np.repeat(each, 5), groups=groups) for each in (base, tuned)]
    assert difference_interval(*copied) == pytest.approx(single)
    ungrouped = difference_interval(*(Scores(each.values) for each in copied))
    assert ungrouped[1] - ungrouped[0] < 0.6 * (single[1] - single[0])


def test_the_interval_of_perplexity_is_of_weighted_exponentials():
    values, weights = np.array([1.0, 2.0]), np.array([3.0, 1.0])
    scores = Scores(values, weights, is_perplexity=True)
    assert scores.metric == pytest.approx(np.exp(1.25))
    worse = Scores(values + np.log(2), weights, is_perplexity=True)
    low, high = difference_interval(scores, worse)
    # A draw holds the first target twice, both, or the second twice; the perplexity doubles in each.
    assert (low, high) == pytest.approx((np.exp(1), np.exp(2)))


def test_other_items_are_refused():
    with pytest.raises(ValueError, match="on 3 and 4 items"):
        difference_interval(Scores(np.ones(3)), Scores(np.ones(4)))
    with pytest.raises(ValueError, match="on other items"):
        difference_interval(*(Scores(np.ones(2), groups=np.array(own)) for own in ([0, 1], [0, 2])))
    result = Result("coco", {}, {"a": 1.0}, {}, {})
    with pytest.raises(ValueError, match="same benchmarks"):
        compare_results([result], [])
    with pytest.raises(ValueError, match=r"coco: the models were measured on other data.*`split` None and 'test'"):
        compare_results([result], [Result("coco", {"split": "test"}, {"a": 1.0}, {}, {})])


@pytest.mark.parametrize(
    ("metric", "low", "high", "verdict"),
    [
        ("accuracy", 0.1, 0.2, "gained"),
        ("accuracy", -0.2, -0.1, "lost"),
        ("accuracy", -0.1, 0.1, "undecided"),
        ("accuracy", None, None, "undecided"),
        ("perplexity", 0.1, 0.2, "lost"),
        ("perplexity", -0.2, -0.1, "gained"),
    ],
)
def test_verdicts(metric, low, high, verdict):
    assert Change("Retrieval", "coco", metric, 0.5, 0.6, low, high, metric == "perplexity").verdict == verdict


def test_values_are_shown_in_percent_and_others_as_they_are():
    def shown(value, base=0.0, in_percent=False, **sign):
        change = Change("Retrieval", "coco", "metric", base, value, None, None, in_percent=in_percent)
        return format_value(change, value, **sign)

    assert shown(0.1234, in_percent=True) == "12.3" and shown(-0.05, in_percent=True, sign=True) == "-5.0"
    assert [shown(value) for value in (5.678, 56.78, 5678.9)] == ["5.68", "56.8", "5679"]
    # A change has as many digits as what it is a change of.
    assert shown(0.01234, sign=True) == "+0.0123" and shown(0.4, base=1487.0) == "0"


def results_of(accuracy, perplexity, seed):
    """200 hits and misses of a benchmark, and 200 targets of rows."""
    hits = Scores(binary(200, accuracy, seed))
    losses = np.random.default_rng(seed).normal(np.log(perplexity), 0.1, 200)
    spoken = Scores(losses, np.full(200, 7.0), is_perplexity=True)
    return [
        Result("sugarcrepe", {"files": ["a.json"]}, {"accuracy": hits.metric}, {"items": 200}, {"accuracy": hits}),
        Result(
            "rows/test",
            {"path": "rows", "split": "test", "revision": "abc"},
            {"perplexity": spoken.metric},
            {"targets": 200},
            {"perplexity": spoken},
        ),
    ]


def test_the_page_says_what_was_gained_and_lost(tmp_path):
    models = {
        "base": results_of(0.5, 4.0, 0),
        "you/tuned": results_of(0.8, 8.0, 1),
        "you/same": results_of(0.5, 4.0, 0),
    }
    page = write_report(models, tmp_path)
    assert (tmp_path / "README.md").read_text() == page
    _, front, body = page.split("---\n", 2)
    assert "Of 2 metrics, 1 gained, 1 lost, and 0 are undecided." in body
    assert "**Lost**: rows/test perplexity." in body and "**Gained**: sugarcrepe accuracy." in body
    assert "Of 2 metrics, 0 gained, 0 lost, and 2 are undecided." in body
    assert "### Compositionality" in body and "### Generation" in body and "200 targets" in body
    tuned, same = yaml.safe_load(front)["model-index"]
    assert (tuned["name"], same["name"]) == ("you/tuned", "you/same")
    entry = next(each for each in tuned["results"] if each["dataset"]["type"] == "rows")
    assert entry["dataset"] == {"name": "rows/test", "type": "rows", "split": "test", "revision": "abc"}
    assert entry["metrics"][0]["type"] == "perplexity"
    assert entry["metrics"][0]["value"] == round(models["you/tuned"][1].metrics["perplexity"], 4)
    data = json.loads((tmp_path / "comparison.json").read_text())
    assert data["base"] == "base" and data["changes"]["you/tuned"][0]["verdict"] == "gained"
    assert is_figure(tmp_path / "comparison.png") and Image.open(tmp_path / "comparison.png").width > 600
    with pytest.raises(ValueError, match="a base model and at least one other"):
        write_report({"base": models["base"]}, tmp_path)


def test_what_only_some_models_were_measured_on_is_said(tmp_path):
    models = {"base": results_of(0.5, 4.0, 0), "you/silent": results_of(0.8, 8.0, 1)[:1]}
    page = write_report(models, tmp_path)
    assert "`you/silent` was not measured on rows/test, which ask for what it does not do." in page
    assert "Of 1 metrics, 1 gained" in page


def test_each_line_of_the_picture_is_one_metric_of_all_models(tmp_path, monkeypatch):
    """Also where a model was not measured on the first benchmark."""
    drawn = []
    plot = matplotlib.axes.Axes.plot

    def keep(axes, x, y, *args, **kwargs):
        drawn.append((axes.get_subplotspec().colspan.start, y[0], kwargs["color"]))
        return plot(axes, x, y, *args, **kwargs)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", keep)
    gained, lost = (
        Change("Retrieval", name, "accuracy", 0.5, 0.6, *interval)
        for name, interval in (("coco", (0.1, 0.2)), ("vist", (-0.2, -0.1)))
    )
    draw_changes({"both": [gained, lost], "second": [lost]}, tmp_path / "a.png")
    assert set(drawn) == {(0, 0, "tab:green"), (0, 1, "tab:red"), (1, 1, "tab:red")}


def test_the_command_compares_and_goes_on(tmp_path, capsys):
    for seed, name in enumerate(("base", "tuned", "other")):
        tiny = make_vlm(seed=seed)
        tiny.model.save_pretrained(tmp_path / name)
        tiny.processor.save_pretrained(tmp_path / name)
    benchmark_files.write_all(tmp_path / "files")
    rows = [{"image": make_image(place), "caption": f"cat {place} on the grass"} for place in range(5)]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "rows"))
    models = [str(tmp_path / name) for name in ("base", "tuned", "other")]
    work = ["--benchmarks", "sugarcrepe", "winoground", "--benchmark_folder", str(tmp_path / "files")]
    (tmp_path / "datasets.yaml").write_text(yaml.safe_dump({"datasets": [{"path": str(tmp_path / "rows")}]}))
    call = ["compare", *models, *work, "--dataset_name", str(tmp_path / "rows"), "--output", str(tmp_path / "out")]
    main(call)
    printed = capsys.readouterr().out
    assert printed.count("### Compositionality") == printed.count("### Generation") == 2
    assert "perplexity" in printed and f"Written to {tmp_path}/out/README.md" in printed
    page = (tmp_path / "out" / "README.md").read_text()
    # What was measured is not measured again, and the page is the same.
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*tuned.json")}
    assert len(stamps) == 1
    main(call)
    assert (tmp_path / "out" / "README.md").read_text() == page
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in stamps.items())
    with pytest.raises(SystemExit, match="given twice"):
        main(["compare", models[0], f"{models[0]}/", *work])
    with pytest.raises(SystemExit, match="There is nothing to measure on"):
        main(["compare", *models])
    with pytest.raises(SystemExit, match="This command reads one dataset"):
        main(["compare", *models, *work, "--config", str(tmp_path / "datasets.yaml")])

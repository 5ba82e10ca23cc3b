"""Benchmarks: their declarations, their loaders on rows of the real schemas, and their metrics by hand."""

import json
import re
from itertools import cycle

import huggingface_hub
import numpy as np
import pytest
import torch
from datasets import load_from_disk

import benchmark_files
from benchmark_files import CATEGORIES, KINDS
from evaluation_cases import HashEmbedder, Speaker, content_of, make_clip
from hf_unigd.cli.main import main
from hf_unigd.data import sources
from hf_unigd.data.sources import OFFLINE
from hf_unigd.evaluation import mteb_tasks
from hf_unigd.evaluation.benchmark_data import READERS, BenchmarkData, read_benchmark
from hf_unigd.evaluation.benchmarking import choose_benchmarks, run_benchmark
from hf_unigd.evaluation.benchmarks import load_benchmarks
from hf_unigd.evaluation.embedders import CannotMeasureError
from hf_unigd.evaluation.matches import ImageSettings
from hf_unigd.evaluation.protocols import PROTOCOLS
from hf_unigd.evaluation.results import Result, ResultsFile
from hf_unigd.evaluation.tables import load_groups, render_table
from tiny_models import make_image, make_vlm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmarks")
    benchmark_files.write_all(path)
    return path


def measured(name, folder, embedder=None):
    embedder = embedder or HashEmbedder()
    file = ResultsFile(None, embedder.description, [])
    return run_benchmark(embedder, load_benchmarks()[name], folder, file, show_progress=False)


def on_rows(protocol, rows, embedder):
    scores, _ = PROTOCOLS[protocol](embedder, BenchmarkData(rows, ImageSettings(), {}))
    return {name: each.metric for name, each in scores.items()}


@pytest.mark.parametrize("name", load_benchmarks())
def test_a_declaration_is_complete(name):
    benchmark = load_benchmarks()[name]
    assert benchmark.protocol in PROTOCOLS and benchmark.data["reader"] in READERS
    assert benchmark.licence and benchmark.citation and benchmark.source
    needs_files = benchmark.data["reader"] not in ("rows", "mteb") or "images" in benchmark.data
    assert bool(benchmark.fetch) >= needs_files
    for data in (benchmark.data, benchmark.knowledge.get("data", {})):
        is_of_hub = data.get("reader") == "rows" and data["path"].partition("/")[0] not in OFFLINE
        assert ("revision" in data) == is_of_hub


def test_rows_of_the_hub_are_loaded_at_their_revision(tmp_path, monkeypatch, folder):
    asked = []

    def load_dataset(path, config, split, streaming, revision):
        asked.append((path, config, revision))
        return load_from_disk(str(folder / "sugarcrepe_pp" / config if config else folder / "scienceqa" / split))

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    reference = tmp_path / "datasets--lmms-lab--ScienceQA-IMG" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text("1a2b\n")
    pinned = read_benchmark(load_benchmarks()["sugarcrepe_pp"], tmp_path)  # where there are images at most
    commit = pinned.description["revision"]
    assert len(commit) == 40 and {row["category"] for row in pinned.rows} == set(benchmark_files.SUGARCREPE_PP)
    names = set(benchmark_files.SUGARCREPE_PP.values())
    assert set(asked) == {("Aman-J/SugarCrepe_pp", name, commit) for name in names}
    moving = read_benchmark(load_benchmarks()["scienceqa"], None).description
    assert asked[-1] == ("lmms-lab/ScienceQA-IMG", None, "main")
    assert moving["revision"] == moving["knowledge"]["revision"] == "1a2b"  # what `main` was when it was loaded
    # Nobody knows the commit of a folder.
    assert read_benchmark(load_benchmarks()["sugarcrepe_pp"], folder).description["revision"] is None
    imagenet = read_benchmark(load_benchmarks()["imagenet"], None).description
    assert imagenet["path"] == "mteb/wds_imagenet1k" and len(imagenet["revision"]) == 40


@pytest.mark.parametrize("group", load_groups())
def test_the_columns_of_a_table_are_metrics_that_benchmarks_have(group, folder):
    """Each is measured, on rows of the real schema; those of MTEB, which reads its own, elsewhere."""
    asking = ("mmvp_vlm_question", "vizwiz", "scienceqa", "fvqa", "webqa", "webqa_positions", "demon")
    embedders = dict.fromkeys(asking, Speaker(cycle(["A"])))
    results = {
        name: measured(name, folder, embedders.get(name)).metrics
        if name != "imagenet"
        else {"accuracy": 0.5, "top5_accuracy": 0.5}
        for name in load_groups()[group].benchmarks
    }
    for table in load_groups()[group].tables:
        for benchmark, *metrics in table.columns.values():
            assert results[benchmark].keys() >= set(metrics), table.title
        assert all(len(row) == len(table.columns) for row in table.rows.values())


def test_flickr30k_has_the_images_of_karpathys_test_split(folder):
    result = measured("flickr30k", folder)
    assert result.counts["image_to_text_queries"] == 4 and result.counts["text_to_image_queries"] == 20
    assert result.dataset["files"] == ["dataset_flickr30k.json"] and result.dataset["split"] == "test"
    assert measured("coco", folder).counts["text_to_image_queries"] == 20


def test_nocaps_is_the_mean_of_its_three_domains(folder):
    embedder = HashEmbedder()
    result = measured("nocaps", folder, embedder)
    domains = [[0], [1, 2, 4], [3]]
    recalls = []
    for places in domains:
        images = np.stack([embedder.vector(content_of(make_image(place))).numpy() for place in places])
        texts = [[embedder.vector((f"A dog {place} {number}.",)).numpy() for number in range(10)] for place in places]
        hits = [np.argmax(images @ text) == own for own, each in enumerate(texts) for text in each]
        recalls.append(np.mean(hits))
    assert result.metrics["text_to_image_recall_at_1"] == pytest.approx(np.mean(recalls))
    assert recalls[1] < 1 and result.counts["text_to_image_queries"] == 50


def test_sugarcrepe_has_an_accuracy_for_each_kind():
    """Of two images each; the caption of the first is nearer than the wrong one, that of the second is not."""
    images = [make_image(0), make_image(1)]
    vectors = {content_of(images[0]): (1.0, 0.0), content_of(images[1]): (0.0, 1.0)}
    rows = []
    for place, kind in enumerate(KINDS):
        vectors |= {(f"right {kind}",): (1.0, 0.2), (f"wrong {kind}",): (1.0, 0.4), ("equal",): (1.0, 0.2)}
        for image in images[: 1 + place % 2]:
            rows.append({"image": image, "caption": f"right {kind}", "negative": f"wrong {kind}", "category": kind})
    rows.append({"image": images[0], "caption": "right add_att", "negative": "equal", "category": "ties"})
    found = on_rows("caption_choice", rows, HashEmbedder(vectors))
    expected = {f"{kind}_accuracy": 0.5 if place % 2 else 1.0 for place, kind in enumerate(KINDS)}
    assert found == pytest.approx({**expected, "ties_accuracy": 0.0, "accuracy": (4 + 3 * 0.5) / 8})


def test_sugarcrepe_reads_its_seven_files(folder):
    embedder = HashEmbedder()
    result = measured("sugarcrepe", folder, embedder)
    assert {f"{kind}_accuracy" for kind in KINDS} < result.metrics.keys()
    assert result.counts == {"items": 14, "images": 2, "texts": 28}
    assert len(embedder.embedded) == 30  # each image once, though seven files name it


def test_sugarcrepe_pp_by_hand():
    image = make_image(0)
    vectors = {
        content_of(image): (1.0, 0.0, 0.0),
        ("first",): (1.0, 0.1, 0.0),
        ("second",): (1.0, 0.0, 0.2),
        ("far",): (0.0, 1.0, 0.0),
        ("between",): (1.0, 0.15, 0.0),  # nearer to the image than the second, and to the first than the second is
    }
    rows = [
        {"image": image, "caption": "first", "caption2": "second", "negative": wrong, "category": wrong}
        for wrong in ("far", "between")
    ]
    found = on_rows("two_positives", rows, HashEmbedder(vectors))
    expected = {"far_itt": 1.0, "far_tot": 1.0, "between_itt": 0.0, "between_tot": 0.0, "itt": 0.5, "tot": 0.5}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("similarities", "text", "image", "group"),
    [
        ([[0.9, 0.1], [0.2, 0.8]], 1, 1, 1),
        ([[0.9, 0.1], [0.95, 0.99]], 1, 0, 0),  # the first text is nearer to the second image
        ([[0.5, 0.6], [0.3, 0.7]], 0, 1, 0),  # the first image is nearer to the second text
        ([[0.1, 0.9], [0.9, 0.1]], 0, 0, 0),
        ([[0.5, 0.5], [0.1, 0.9]], 0, 1, 0),  # equal is not nearer
    ],
)
def test_winoground_by_hand(similarities, text, image, group):
    images = [make_image(0), make_image(1)]

    class Given(HashEmbedder):
        """Images are unit vectors, whose similarities to the texts are those given."""

        def vector(self, key):
            table = torch.tensor(similarities)
            if key in (("zero",), ("one",)):
                own = table[:, 0 if key == ("zero",) else 1]
                return torch.cat([own, (1 - own.square().sum()).clamp(min=0).sqrt()[None]])
            return torch.eye(3)[0 if key == content_of(images[0]) else 1]

    row = {"image_0": images[0], "image_1": images[1], "caption_0": "zero", "caption_1": "one"}
    found = on_rows("image_text_group", [row], Given())
    assert found == {"text_score": text, "image_score": image, "group_score": group}


def test_mmvp_vlm_pairs_the_lines_of_its_questions(folder):
    data = read_benchmark(load_benchmarks()["mmvp_vlm"], folder)
    assert [row["category"] for row in data.rows] == list(CATEGORIES)
    assert data.rows[1]["image_1"] == "Presence of Specific Features/4.jpg"
    assert data.rows[1]["caption_1"] == "a photo of a cat 4"
    assert f"{CATEGORIES[7]}_image_score" in measured("mmvp_vlm", folder).metrics


def test_vist_orders_its_pictures_and_leaves_out_stories_without_all_of_them(folder):
    data = read_benchmark(load_benchmarks()["vist"], folder)
    assert len(data.rows) == 3 and data.counts == {"left_out": 1}
    assert data.rows[1]["captions"] == [f"Scene {order} of 1." for order in range(5)]
    assert [name.split(".")[0] for name in data.rows[1]["images"]] == ["100", "101", "102", "103", "104"]
    result = measured("vist", folder)
    assert {
        f"{kind}{seen}_recall_at_{k}" for kind in ("5c", "5c+4i") for seen in ("", "_unseen") for k in (1, 5, 10)
    } == (result.metrics.keys())


def test_questions_are_answered_with_yes_or_no():
    rows = [
        {"image": make_image(place), "question": f"Is there a cat {place}?", "answer": answer, "category": category}
        for place, (answer, category) in enumerate(
            [("yes", "random"), ("no", "random"), ("no", "popular"), ("yes", "popular")]
        )
    ]
    speaker = Speaker([" Yes, there is.", "no", "Nothing is known.", "NO"])
    scores, counts = PROTOCOLS["yes_no"](speaker, BenchmarkData(rows, ImageSettings(), {}))
    assert {name: each.metric for name, each in scores.items()} == {
        "random_accuracy": 1.0,
        "popular_accuracy": 0.0,
        "accuracy": 0.5,
    }
    assert counts == {"items": 4, "neither_yes_nor_no": 1}
    assert "Is there a cat 0?" in speaker.asked[0]
    with pytest.raises(CannotMeasureError, match="hash does not generate"):
        PROTOCOLS["yes_no"](HashEmbedder(), BenchmarkData(rows, ImageSettings(), {}))


def test_the_question_form_asks_for_the_first_picture_of_each_pair(folder):
    speaker = Speaker(cycle(["A", "The answer is B.", "Aha"]))
    result = measured("mmvp_vlm_question", folder, speaker)
    assert result.counts == {"items": 18, "neither_a_nor_b": 6}
    right = {"A": 0, "B": 0}
    # The statement of the first picture stands after the right letter.
    for place, (asked, said) in enumerate(zip(speaker.asked, cycle("AB-"))):
        number, first = divmod(place, 2)
        own, other = 2 * number + 1 + first, 2 * number + 2 - first
        letter = "A" if f"A.a cat {own}\nB.a cat {other}\n" in asked else "B"
        assert f"{letter}.a cat {own}\n" in asked and asked.index("First Image") < asked.index("Second Image")
        right[letter] += said == letter
    assert result.metrics["question_accuracy"] == pytest.approx(sum(right.values()) / 18)
    assert len(speaker.asked) == 18 and result.scores["question_accuracy"].groups is not None


def test_what_a_model_does_not_do_is_left_out_and_said(tmp_path, folder, caplog, capsys):
    make_clip(tmp_path)
    work = ["--benchmarks", "sugar", "--benchmark_folder", str(folder)]
    main(["evaluate", str(tmp_path), *work])
    assert "VIST is left out" in caplog.text and "question form is left out" in caplog.text
    printed = capsys.readouterr().out
    assert "winoground: " in printed and "vist: " not in printed
    with pytest.raises(SystemExit, match="cannot be measured on any of these benchmarks"):
        main(["evaluate", str(tmp_path), "--benchmarks", "vist", "--benchmark_folder", str(folder)])


@pytest.mark.parametrize(
    ("name", "remove", "message"),
    [
        (
            "flickr30k",
            "flickr30k/dataset_flickr30k.json",
            "Flickr30k cannot be read: there is no file .* It needs: flickr30k/",
        ),
        ("sugarcrepe", "sugarcrepe/swap_obj.json", "SugarCrepe cannot be read: there is no file .*swap_obj.json"),
    ],
)
def test_what_has_to_be_fetched_is_said(tmp_path, name, remove, message):
    benchmark_files.write_all(tmp_path)
    (tmp_path / remove).unlink()
    with pytest.raises(ValueError, match=message):
        measured(name, tmp_path)
    with pytest.raises(ValueError, match="no `--benchmark_folder` is given"):
        measured(name, None)


def test_mteb_knows_the_tasks_of_its_benchmarks():
    import mteb

    for name in ("imagenet", "aro", "mieb_lite", "flickr30k_mteb", "coco_mteb"):
        tasks = [row["task"] for row in read_benchmark(load_benchmarks()[name], None).rows]
        assert {task.metadata.name for task in mteb.get_tasks(tasks)} == set(tasks)
        assert len(tasks) > 30 if name == "mieb_lite" else len(tasks) == {"imagenet": 1, "aro": 4}.get(name, 2)


def test_unknown_benchmarks_are_refused():
    with pytest.raises(ValueError, match=r"There is no benchmark 'coca'\. The benchmarks are aro, coco, .* groups"):
        choose_benchmarks(["coco", "coca"])
    expected = ["coco", "demon", "vist", "winoground", "mmvp_vlm", "mmvp_vlm_question", "vizwiz", "scienceqa"]
    expected += ["webqa_positions", "fvqa", "webqa"]
    assert [each.name for each in choose_benchmarks(["coco", "sugar"])] == expected


def test_a_row_of_a_table_stands_below_those_of_the_paper():
    table = load_groups()["vladva"].tables[3]
    metrics = {f"{kind}_accuracy": 0.1 * place for place, kind in enumerate(KINDS)}
    results = [Result("sugarcrepe", {}, metrics, {})]
    assert table.row_of(results) == pytest.approx([10.0, 35.0, 55.0, None, None], nan_ok=True)
    lines = render_table(table, {"mine": results}).splitlines()
    assert "LLaVA-1.5-7B (paper)" in lines[2] and "81.9" in lines[2]
    assert "**mine** (measured)" in lines[-1] and "35.0" in lines[-1] and lines[-1].rstrip(" |").endswith("-")


@pytest.mark.parametrize("group", load_groups())
def test_a_group_runs_whole_through_the_command(group, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        mteb_tasks, "run_tasks", lambda embedder, names, show: {name: {"accuracy": 0.25} for name in names}
    )
    tiny = make_vlm()
    tiny.model.save_pretrained(tmp_path / "vlm")
    tiny.processor.save_pretrained(tmp_path / "vlm")
    output = tmp_path / "results.json"
    call = ["evaluate", str(tmp_path / "vlm"), "--benchmarks", group, "--benchmark_folder", str(folder)]
    main([*call, "--output", str(output)])
    printed = capsys.readouterr().out
    stored = json.loads(output.read_text())
    assert [each["benchmark"] for each in stored["results"]] == load_groups()[group].benchmarks
    for table in load_groups()[group].tables:
        assert table.title in printed
    assert len(re.findall(r"\(measured\)", printed)) == len(load_groups()[group].tables)
    # A run that was interrupted after some benchmarks goes on with the others.
    stored["results"] = stored["results"][1:]
    output.write_text(json.dumps(stored))
    main([*call, "--output", str(output)])
    assert len(json.loads(output.read_text())["results"]) == len(load_groups()[group].benchmarks)


@pytest.mark.parametrize(
    ("name", "chances"),
    [
        ("scenes_retrieval", {"text_to_image_recall_at_10": 10 / 500, "image_to_text_recall_at_10": 10 / 500}),
        ("scenes_sugarcrepe", {"accuracy": 1 / 2}),
        ("scenes_sugarcrepe_pp", {"itt": 1 / 3, "tot": 1 / 3}),
        ("scenes_winoground", {"text_score": 1 / 4, "image_score": 1 / 4, "group_score": 1 / 6}),
    ],
)
def test_random_embeddings_score_chance_on_the_scenes(name, chances):
    pytest.importorskip("hf_unigd.data.scenes")
    result = measured(name, None, HashEmbedder())
    for metric, chance in chances.items():
        scores = result.scores[metric]
        assert scores.metric == pytest.approx(chance, abs=4 * np.sqrt(chance * (1 - chance) / len(scores.values)))

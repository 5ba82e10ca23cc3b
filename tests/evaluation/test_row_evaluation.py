"""Retrieval and perplexity on rows, against the protocols that others define."""

import json
import socket
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from datasets import Dataset

from evaluation_cases import HashEmbedder, content_of, evaluated, karpathy_rows
from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.cli.main import main
from hf_unigd.data import RowError
from hf_unigd.evaluation.embedders import ModelEmbedder
from tiny_models import make_image, make_vlm


LONG = "a picture of a small yellow car with three people waving from its windows on the green grass " * 4


def coco_5k_protocol(rows, embedder, ks=(1, 5, 10)):
    """Recall as the original evaluation code of Karpathy's split computes it: a matrix of all images and captions, the
    rank of the first of an image's captions, and of a caption's image."""
    images = np.stack([embedder.vector(content_of(row["image"])).numpy() for row in rows])
    captions = np.stack([embedder.vector((text,)).numpy() for row in rows for text in row["caption"]])
    owner = np.repeat(np.arange(len(rows)), [len(row["caption"]) for row in rows])
    similarity = images.astype(np.float32) @ captions.T.astype(np.float32)
    ranks = {"anchor_to_positive": [], "positive_to_anchor": []}
    for image, scores in enumerate(similarity):
        order = np.argsort(-scores, kind="stable")
        ranks["anchor_to_positive"].append(np.flatnonzero(owner[order] == image)[0])
    for caption, scores in enumerate(similarity.T):
        order = np.argsort(-scores, kind="stable")
        ranks["positive_to_anchor"].append(np.flatnonzero(order == owner[caption])[0])
    return {f"{name}_recall_at_{k}": np.mean(np.array(each) < k) for name, each in ranks.items() for k in ks}


@pytest.mark.parametrize("seed", range(3))
def test_recall_is_that_of_the_coco_5k_protocol(seed):
    rows, embedder = karpathy_rows(seed=seed), HashEmbedder()
    result = evaluated(rows, embedder)
    assert dict(result.metrics) == pytest.approx(coco_5k_protocol(rows, embedder))
    assert 0 < result.metrics["anchor_to_positive_recall_at_5"] < 1
    assert result.counts == {
        "rows": 12,
        "left_out": 0,
        "skipped": 0,
        "anchor_to_positive_queries": 12,
        "anchor_to_positive_candidates": 60,
        "positive_to_anchor_queries": 60,
        "positive_to_anchor_candidates": 12,
    }


def test_one_row_for_each_caption_is_the_same_as_a_list_of_captions():
    rows, embedder = karpathy_rows(), HashEmbedder()
    single = [
        {"image": row["image"], "image_id": row["image_id"], "caption_id": key, "caption": text}
        for row in rows
        for text, key in zip(row["caption"], row["caption_id"], strict=True)
    ]
    expected, found = evaluated(rows, embedder), evaluated(single, embedder)
    assert found.metrics == expected.metrics
    assert {**found.counts, "rows": 12} == expected.counts
    # A caption that is written twice under its id is one query.
    twice = evaluated(single + single[:7], embedder)
    assert twice.metrics == expected.metrics and twice.counts["positive_to_anchor_queries"] == 60


def test_each_distinct_image_and_text_is_embedded_once():
    rows, embedder = karpathy_rows(), HashEmbedder()
    evaluated(rows, embedder)
    texts = {(text,) for row in rows for text in row["caption"]}
    images = {content_of(row["image"]) for row in rows}
    assert len(images) == 11 and len(texts) < 60
    assert sorted(embedder.embedded, key=repr) == sorted(texts | images, key=repr)


@pytest.mark.parametrize(
    ("column", "batch_size", "runs"), [("short_caption", 32, 4), ("caption", 32, 8), ("caption", 5, 8)]
)
def test_the_tower_runs_once_for_an_image_with_five_captions(column, batch_size, runs):
    """Once to embed it, and once to predict its captions."""
    tiny = make_vlm()
    model, processor = UniGDForConditionalGeneration.from_vlm(tiny.model), UniGDProcessor(tiny.processor)
    rows = [
        {"image": make_image(place), column: [f"cat {place} {number}" for number in range(5)]} for place in range(4)
    ]
    seen = []
    tower = model.vlm.base_model.vision_tower
    tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len([*args, *kwargs.values()][0])), with_kwargs=True
    )
    result = evaluated(rows, ModelEmbedder(model, processor, "llava", batch_size))
    assert sum(seen) == runs and result.counts["positive_to_anchor_queries"] == 20


def test_without_ids_equal_images_are_one_item_and_every_caption_is_a_query():
    """Two images, each in two rows, and the same two captions for both: as in the issue's toy, where R@1 doubled."""
    first, second = make_image(0), make_image(1)
    rows = [{"image": image, "caption": text} for image in (first, second) for text in ("a cat", "a dog")]
    vectors = {
        content_of(first): (1.0, 0.0),
        content_of(second): (0.0, 1.0),
        ("a cat",): (1.0, 0.5),  # nearer to the first image, whichever it describes
        ("a dog",): (1.0, 0.4),
    }
    result = evaluated(rows, HashEmbedder(vectors))
    assert result.counts["positive_to_anchor_queries"] == 4 and result.counts["positive_to_anchor_candidates"] == 2
    assert result.metrics["positive_to_anchor_recall_at_1"] == 0.5
    # Of equal captions, the first in the data comes first: the first image's own dog, and the second image's rival.
    assert result.metrics["anchor_to_positive_recall_at_1"] == 0.5


def test_captions_of_any_length_take_part():
    rows = [
        {"image": make_image(place), "caption": f"{place} {LONG}" if place % 2 else f"cat {place}"}
        for place in range(8)
    ]
    result = evaluated(rows)
    assert result.counts["positive_to_anchor_queries"] == result.counts["positive_to_anchor_candidates"] == 8
    assert result.counts["left_out"] == 0


def test_rows_without_a_match_and_bad_rows_are_counted():
    rows = [{"image": make_image(place), "short_caption": f"cat {place}"} for place in range(4)]
    rows += [{"image": make_image(5), "long_caption": "a dog"}, {"image": make_image(6), "short_caption": " "}]
    with pytest.raises(RowError, match="Row 5 has an empty `short_caption`"):
        evaluated(rows)
    result = evaluated(rows, skip_bad_rows=True)
    assert (result.counts["rows"], result.counts["left_out"], result.counts["skipped"]) == (6, 1, 1)
    assert result.counts["anchor_to_positive_queries"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": "img1"}, "Rows 1 and 2 have the same `image_id` 'img1' and different content"),
        ({"caption_id": [1, 2]}, "Row 2 has 5 captions in `caption` and 2 in `caption_id`"),
        ({"image_id": [3]}, "Row 2 has a `image_id` of type list"),
    ],
)
def test_ids_that_contradict_the_rows_are_refused(change, message):
    rows = karpathy_rows()
    rows[2] |= change
    with pytest.raises(ValueError, match=message):
        evaluated(rows)


def test_questions_with_several_answers_are_one_query():
    pairs = [("who", "a cat"), ("who", "a dog"), ("what", "a cat")]
    result = evaluated([{"anchor": anchor, "positive": positive} for anchor, positive in pairs])
    assert result.counts["anchor_to_positive_queries"] == result.counts["anchor_to_positive_candidates"] == 2


def expected_perplexity(model, processor, pairs):
    """Of images and texts, one at a time, by the backbone."""
    total, count = 0.0, 0
    for image, text in pairs:
        batch = processor.process_sequences([[image]], [text])
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        inputs = {name: value for name, value in batch.items() if name != "spans"}
        total, count = total + model.vlm(**inputs).loss.item() * tokens, count + tokens
    return np.exp(total / count)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "gemma3", "idefics3"])
@torch.no_grad()
def test_perplexity_is_that_of_every_long_caption_and_caption(family):
    tiny = make_vlm(family)
    model, processor = UniGDForConditionalGeneration.from_vlm(tiny.model), UniGDProcessor(tiny.processor)
    embedder = ModelEmbedder(model, processor, "llava", batch_size=3)
    images = [make_image(place, (24 + 8 * place, 20)) for place in range(3)]
    rows = [
        {"image": images[0], "caption": ["a red cat", LONG]},
        {"image": images[1], "short_caption": "a dog", "long_caption": "two blue dogs on the green grass"},
        {"image": images[2], "short_caption": "a car"},
    ]
    result = evaluated(rows, embedder)
    learned = [(images[0], "a red cat"), (images[0], LONG.strip()), (images[1], rows[1]["long_caption"])]
    assert result.metrics["perplexity"] == pytest.approx(expected_perplexity(model, processor, learned), rel=1e-4)
    assert result.counts["targets"] == 3 and result.counts["positive_to_anchor_queries"] == 4
    scores = result.scores["perplexity"]
    assert scores.metric == result.metrics["perplexity"] and scores.groups.tolist() == [0, 0, 1]


def test_a_row_that_is_too_long_is_skipped_everywhere(llava):
    model, processor = llava
    rows = [{"image": make_image(place), "caption": f"cat {place}"} for place in range(3)]
    rows.append({"image": make_image(3), "caption": LONG * 20})
    embedder = ModelEmbedder(model, processor, "llava")
    with pytest.raises(RowError, match="Row 3 "):
        evaluated(rows, embedder)
    result = evaluated(rows, embedder, skip_bad_rows=True)
    assert result.counts["skipped"] == 1 and result.counts["targets"] == 3


def evaluate_on_rank(rank, port, folder):
    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**environment, "ACCELERATE_USE_CPU": "true"}.items():
            patch.setenv(name, str(value))
        tiny = make_vlm()
        model, processor = UniGDForConditionalGeneration.from_vlm(tiny.model), UniGDProcessor(tiny.processor)
        embedder = ModelEmbedder(model, processor, "llava")
        embedded, whole = [], embedder.embed

        def embed(sequences, show_progress=False):
            embedded.append(len(sequences))
            return whole(sequences, show_progress)

        embedder.embed = embed
        result = evaluated(karpathy_rows(), embedder)
        with pytest.raises(RowError, match="Row 3 "):  # which only one of them reads
            evaluated([*karpathy_rows()[:3], {"image": make_image(0), "caption": " "}], embedder)
        torch.save((dict(result.metrics), dict(result.counts), embedded[:2]), folder / f"{rank}.pt")
        torch.distributed.destroy_process_group()


def test_two_processes_share_the_work_and_report_the_same(tmp_path, llava):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(evaluate_on_rank, (port, tmp_path), nprocs=2)
    embedder = ModelEmbedder(*llava, "llava")
    expected = evaluated(karpathy_rows(), embedder)
    embedded = []
    for rank in (0, 1):
        metrics, counts, share = torch.load(tmp_path / f"{rank}.pt")
        assert metrics == pytest.approx(dict(expected.metrics), rel=1e-5) and counts == expected.counts
        embedded.append(sum(share))
    distinct = len({text for row in karpathy_rows() for text in row["caption"]}) + 11
    assert sum(embedded) == distinct and abs(embedded[0] - embedded[1]) <= 2


MEMORY = """
import resource, sys, torch
from hf_unigd.evaluation import retrieval_metrics
size = int(sys.argv[1])
torch.manual_seed(0)
vectors = torch.nn.functional.normalize(torch.randn(size, 16), dim=1)
keys = torch.arange(size)
retrieval_metrics(vectors[:8], vectors[:8], keys[:8], keys[:8])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert retrieval_metrics(vectors, vectors, keys, keys)["anchor_to_positive_recall_at_1"] == 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_the_memory_of_retrieval_metrics_does_not_grow_with_the_matrix():
    """All similarities of 12,000 x 12,000 would take 576 MB."""
    run = partial(subprocess.run, capture_output=True, text=True, check=True)
    used = int(run([sys.executable, "-c", MEMORY, "12000"]).stdout) * 1024
    assert used < 300e6


def test_the_command_evaluates_what_is_not_ours_and_goes_on(tmp_path, capsys):
    tiny = make_vlm()
    tiny.model.save_pretrained(tmp_path / "vlm")
    tiny.processor.save_pretrained(tmp_path / "vlm")
    rows = [{"image": make_image(place), "caption": f"cat {place} on the grass"} for place in range(5)]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "rows"))
    output = tmp_path / "results.json"
    call = ["evaluate", str(tmp_path / "vlm"), "--dataset_name", str(tmp_path / "rows"), "--output", str(output)]
    main(call)
    printed = capsys.readouterr().out
    assert "5 anchor to positive queries" in printed and "0 left out" in printed and "perplexity" in printed
    before = output.read_bytes()
    stored = json.loads(before)
    stored["results"][0]["metrics"]["perplexity"] = 7.0  # shows that the result is read, and not made again
    output.write_text(json.dumps(stored))
    main(call)
    assert "perplexity                       7.0000" in capsys.readouterr().out
    main([*call, "--overwrite", "true"])
    assert output.read_bytes() == before
    with pytest.raises(SystemExit, match=r"results of another model: `prompts` was .* Name another `--output`"):
        main([*call, "--text_prompt", "Name it:"])

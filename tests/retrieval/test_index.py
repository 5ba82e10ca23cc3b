"""Making an index, interrupting that, and searching it with the right model and with wrong ones."""

import gc
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.data import RowError
from hf_unigd.retrieval import EmbeddingIndex, build_index, embed_sequences
from hf_unigd.retrieval.probe import probes_differ
from index_cases import IMAGES, build, knowledge, questions
from tiny_models import make_vlm


def another_model():
    return UniGDForConditionalGeneration.from_vlm(make_vlm(seed=1).model)


def pixels(parts):
    return [part if isinstance(part, str) else part.tobytes() for part in parts]


@pytest.mark.parametrize("faiss", [None, "Flat"])
def test_an_index_finds_its_own_rows_with_their_answers(llava, tmp_path, faiss):
    build(llava, tmp_path / "index", faiss=faiss)
    index = EmbeddingIndex.load(tmp_path / "index")
    assert (index.faiss is None) == (faiss is None)
    found = index.search(*llava, questions(), k=3, batch_size=2)
    for row, (question, hits) in enumerate(zip(questions(), found, strict=True)):
        assert hits[0].row == row and hits[0].score == pytest.approx(1, abs=1e-5)
        assert pixels(hits[0].sequence) == pixels(question if isinstance(question, list) else [question])
        scores = [hit.score for hit in hits]
        assert scores == sorted(scores, reverse=True)
    answers = [["three people"], [], ["a yellow car"], ["dogs"], ["on the green grass"]]
    assert [hits[0].answer for hits in found] == answers


def test_scores_are_cosines_of_the_questions_alone(llava, tmp_path):
    index = build(llava, tmp_path)
    vectors = embed_sequences(*llava, questions(), show_progress=False)
    (hits,) = index.search(*llava, ["a small car"], k=5)
    expected = embed_sequences(*llava, ["a small car"], show_progress=False) @ vectors.T
    assert [hit.score for hit in hits] == pytest.approx(expected[0].sort(descending=True).values.tolist(), abs=1e-5)
    assert [hit.row for hit in hits] == expected[0].argsort(descending=True).tolist()


def test_rows_without_match_or_caption_are_indexed(llava, tmp_path):
    images = build(llava, tmp_path / "images", Dataset.from_dict({"image": IMAGES}, Features({"image": Image()})))
    assert [hits[0].row for hits in images.search(*llava, [[image] for image in IMAGES], k=1)] == [0, 1, 2, 3]
    texts = build(llava, tmp_path / "texts", Dataset.from_dict({"anchor": ["a cat", "two dogs"]}))
    assert texts.search(*llava, ["two dogs"], k=1)[0][0].sequence == ["two dogs"]


def test_captions_of_any_length_come_along(llava, tmp_path):
    rows = {"image": IMAGES[:1], "short_caption": ["a cat"], "long_caption": ["grass " * 600 + "end"]}
    (hit,) = build(llava, tmp_path, Dataset.from_dict(rows, Features({"image": Image(), **dict.fromkeys(
        ("short_caption", "long_caption"), Value("string"))}))).search(*llava, [[IMAGES[0]]], k=1)[0]  # fmt: skip
    assert hit.answer == ["a cat", rows["long_caption"][0]]


def test_pictures_can_be_left_out(llava, tmp_path):
    index = build(llava, tmp_path, store_images=False)
    (hits,) = index.search(*llava, [[IMAGES[1], "what is it"]], k=1)
    assert hits[0].row == 2 and hits[0].score == pytest.approx(1, abs=1e-5)
    assert hits[0].sequence == ["what is it"] and hits[0].image is None


def test_a_matryoshka_prefix_is_searched_by_the_same_prefix(tmp_path):
    tiny = make_vlm()
    model = UniGDForConditionalGeneration.from_vlm(
        tiny.model, head_type="linear", embedding_dim=16, matryoshka_dims=[8]
    )
    pair = model, UniGDProcessor(tiny.processor)
    index = build(pair, tmp_path, truncate_dim=8)
    assert index.width == 8
    expected = embed_sequences(*pair, questions(), truncate_dim=8, show_progress=False)
    assert torch.allclose(torch.cat(list(index.chunks())), expected, atol=1e-5)
    assert [hits[0].row for hits in index.search(*pair, questions(), k=1)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"`truncate_dim=5` was not trained"):
        build(pair, tmp_path / "other", truncate_dim=5)
    build(pair, tmp_path / "other", truncate_dim=8)  # nothing was embedded, so nothing is in the way


def test_one_batch_of_pictures_is_in_memory(llava, tmp_path, monkeypatch):
    def living():
        return sum(issubclass(type(thing), PILImage.Image) for thing in gc.get_objects())

    rows = knowledge(repeat=6)
    gc.collect()
    before, most = living(), []
    embed = type(llava[0]).embed
    monkeypatch.setattr(
        type(llava[0]), "embed", lambda self, **batch: [embed(self, **batch), most.append(living() - before)][0]
    )
    build(llava, tmp_path, rows, rows_per_part=30)
    assert len(most) == 15 and max(most) <= 10  # 24 pictures; at most 3 in two rows, in a few forms each


KILLED = """
import os, signal, sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from index_cases import build, knowledge
from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from tiny_models import make_vlm
tiny = make_vlm()
model, calls = UniGDForConditionalGeneration.from_vlm(tiny.model), []
embed = model.embed
def embed_and_die(**batch):
    calls.append(1)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return embed(**batch)
model.embed = embed_and_die
build((model, UniGDProcessor(tiny.processor)), sys.argv[3], knowledge(repeat=4), rows_per_part=4)
"""


def test_a_killed_run_goes_on_to_the_same_index(llava, tmp_path, monkeypatch, caplog):
    here = Path(__file__).parent
    killed = subprocess.run([sys.executable, "-c", KILLED, str(here), str(here.parent), str(tmp_path / "index")])
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match=r"unfinished: it has 12 of 20 rows\. Run the same `hf-unigd index` again"):
        EmbeddingIndex.load(tmp_path / "index")

    embedded = []
    embed = type(llava[0]).embed
    monkeypatch.setattr(
        type(llava[0]), "embed", lambda self, **batch: [embed(self, **batch), embedded.append(len(batch["spans"]))][0]
    )
    resumed = build(llava, tmp_path / "index", knowledge(repeat=4), rows_per_part=3)
    assert "Going on at row 12 of 20" in caplog.text
    assert sum(embedded) == 8  # what was missing
    monkeypatch.undo()

    whole = build(llava, tmp_path / "whole", knowledge(repeat=4))
    assert resumed.entries["row"] == whole.entries["row"] == list(range(20))
    torch.testing.assert_close(torch.cat(list(resumed.chunks())), torch.cat(list(whole.chunks())), atol=1e-5, rtol=0)
    for one, other in zip(resumed.nearest(torch.cat(list(whole.chunks())), 1), whole.entries, strict=True):
        assert one[0].row == other["row"]
    assert not list((tmp_path / "index").glob("*.unfinished"))


def test_a_finished_index_is_not_made_again(llava, tmp_path):
    build(llava, tmp_path)
    times = {file: file.stat().st_mtime_ns for file in tmp_path.glob("rows-*")}
    build(llava, tmp_path, faiss="Flat")
    assert EmbeddingIndex.load(tmp_path).faiss.ntotal == 5
    build(llava, tmp_path, faiss="HNSW8")
    assert EmbeddingIndex.load(tmp_path).description.faiss == "HNSW8"
    assert build(llava, tmp_path).faiss is None and not (tmp_path / "index.faiss").exists()
    assert times == {file: file.stat().st_mtime_ns for file in tmp_path.glob("rows-*")}


def test_an_interrupted_faiss_index_is_unfinished(llava, tmp_path):
    with pytest.raises(ValueError, match=r"cannot train `faiss='IVF64,Flat'` on 5 vectors.*embeddings are kept"):
        build(llava, tmp_path, faiss="IVF64,Flat")
    with pytest.raises(ValueError, match="unfinished"):
        EmbeddingIndex.load(tmp_path)
    assert len(build(llava, tmp_path)) == 5


def test_another_model_is_refused_by_search_and_by_resuming(llava, tmp_path):
    model, processor = llava
    index = build(llava, tmp_path)
    with pytest.raises(ValueError, match=r"The index was made by some/model, and this model embeds its probe elsewhe"):
        index.search(another_model(), processor, ["a cat"], k=1)
    with pytest.raises(ValueError, match="another model, or has been trained since"):
        build((another_model(), processor), tmp_path)
    assert len(build((another_model(), processor), tmp_path, overwrite=True)) == 5
    with pytest.raises(ValueError, match="another model"):
        EmbeddingIndex.load(tmp_path).search(model, processor, ["a cat"], k=1)


@pytest.mark.parametrize(("made_in", "searched_in"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_same_model_in_half_precision_is_the_same_model(llava, tmp_path, made_in, searched_in):
    models = {"float32": llava[0], "bfloat16": UniGDForConditionalGeneration.from_vlm(make_vlm().model.bfloat16())}
    index = build((models[made_in], llava[1]), tmp_path)
    assert index.description.dtype == made_in
    assert index.search(models[searched_in], llava[1], ["two blue dogs"], k=1)[0][0].row == 4


@pytest.mark.parametrize(("dtype", "share"), [("float32", 2e-4), ("float16", 0.02), ("bfloat16", 0.1)])
@pytest.mark.parametrize("width", [32, 4096])
def test_probes_are_compared_relative_to_their_length(dtype, share, width):
    """Numbers of wide unit vectors are small: an absolute tolerance would take any two for the same."""
    one, other = torch.nn.functional.normalize(torch.randn(2, width, generator=torch.Generator().manual_seed(0)))
    moved = one + share * other * one.norm() / other.norm()
    assert probes_differ(one.tolist(), moved.tolist(), ("float32", dtype))
    assert not probes_differ(one.tolist(), (one + 0.2 * (moved - one)).tolist(), (dtype, "float32"))
    assert probes_differ(one.tolist(), one[:8].tolist(), (dtype, dtype))


def test_the_commit_kept_is_the_models_own(llava, tmp_path):
    llava[0].name_or_path, llava[0].config._commit_hash = "some/base", "c0ffee"
    assert build_index(*llava, knowledge(), tmp_path / "base", show_progress=False).description.revision == "c0ffee"
    adapter = build(llava, tmp_path / "adapter").description
    assert (adapter.model, adapter.revision) == ("some/model", None)


def test_other_rows_or_settings_are_refused_unless_it_starts_anew(llava, tmp_path):
    build(llava, tmp_path)
    with pytest.raises(ValueError, match=r"`rows` was '\w+', now '\w+'; `num_rows` was 5, now 10.*`--overwrite true`"):
        build(llava, tmp_path, knowledge(repeat=2))
    with pytest.raises(ValueError, match="`store_images` was True, now False"):
        build(llava, tmp_path, store_images=False)
    assert len(build(llava, tmp_path, knowledge(repeat=2), overwrite=True)) == 10


def test_a_folder_of_something_else_is_left_alone(llava, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds other files, and no index"):
        build(llava, tmp_path, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_bad_searches_say_why(llava, tmp_path):
    index = build(llava, tmp_path / "index")
    with pytest.raises(ValueError, match=r"`k=6` must lie between 1 and the number of entries in the index, 5"):
        index.search(*llava, ["a"], k=6)
    with pytest.raises(ValueError, match="`k=0`"):
        index.search(*llava, ["a"], k=0)
    with pytest.raises(ValueError, match="width 3, but the index holds vectors of 32"):
        index.nearest(torch.eye(3), k=1)
    with pytest.raises(ValueError, match="The index is empty"):
        EmbeddingIndex(index.description, index.entries.select([])).search(*llava, ["a"], k=1)
    with pytest.raises(ValueError, match="holds no index; `hf-unigd index"):
        EmbeddingIndex.load(tmp_path)
    with pytest.raises(ValueError, match="which is searched exactly"):
        EmbeddingIndex.load(tmp_path / "index", faiss_parameters="nprobe=2")
    (tmp_path / "index" / "index.json").write_text('{"model": "m"}')
    with pytest.raises(ValueError, match=r"index\.json does not describe an index"):
        EmbeddingIndex.load(tmp_path / "index")


def test_a_faiss_search_that_finds_fewer_says_so(llava, tmp_path, caplog):
    index = build(llava, tmp_path, knowledge(repeat=16), faiss="IVF16,Flat")
    found = index.search(*llava, ["a red cat"], k=80)[0]
    assert 0 < len(found) < 80 and f"FAISS found {len(found)} of 80" in caplog.text
    everywhere = EmbeddingIndex.load(tmp_path, faiss_parameters="nprobe=16")
    assert len(everywhere.search(*llava, ["a red cat"], k=80)[0]) == 80


def test_compressed_vectors_are_scored_by_the_whole_ones(llava, tmp_path):
    index = build(llava, tmp_path, knowledge(repeat=4), faiss="SQ4")
    query = embed_sequences(*llava, ["a red cat"], show_progress=False)
    exact = (query @ torch.cat(list(index.chunks())).T)[0].tolist()
    hits = index.nearest(query, k=10)[0]
    assert [hit.score for hit in hits] == pytest.approx([exact[hit.row] for hit in hits], abs=1e-6)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_datasets_that_make_no_index_are_refused(llava, tmp_path):
    with pytest.raises(ValueError, match="has no rows"):
        build(llava, tmp_path, knowledge().select([]))
    with pytest.raises(ValueError, match=r"No accepted row format has the columns \['caption'\]"):
        build(llava, tmp_path, Dataset.from_dict({"caption": ["a"]}))
    with pytest.raises(ValueError, match="which a stream does not have"):
        build(llava, tmp_path, knowledge().to_iterable_dataset())
    assert not list(tmp_path.iterdir())


def test_bad_rows_are_named_or_skipped_and_counted(llava, tmp_path, caplog):
    picture = tmp_path / "good.png"
    IMAGES[0].save(picture)
    rows = Dataset.from_dict(
        {
            "image": [str(picture), str(picture), "missing.png", None, str(picture)],
            "caption": ["a", "b", "c", None, "e"],
            "anchor": [None, None, None, "an <image> in a text", None],
        }
    )
    with pytest.raises(RowError, match=r"Row 2 has a missing image: there is no file missing\.png"):
        build(llava, tmp_path / "index", rows, rows_per_part=2)
    with pytest.raises(ValueError, match="it has 2 of 5 rows"):
        EmbeddingIndex.load(tmp_path / "index")
    index = build(llava, tmp_path / "index", rows, rows_per_part=2, skip_bad_rows=True)
    assert index.entries["row"] == [0, 1, 4]
    assert "Row 3 has the reserved token '<image>'" in caplog.text and "Skipped 2 of 5 rows" in caplog.text
    with pytest.raises(ValueError, match="None of the 1 rows can be used"):
        build(llava, tmp_path / "none", rows.select([2]), skip_bad_rows=True)

"""Making an index, adding to it, changing it, and searching it with the right model and with wrong ones."""

import gc
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.bulk.probe import probe, probes_differ
from hf_unigd.data import RowError
from hf_unigd.retrieval import EmbeddingIndex, RowAdder, build_index, embed_sequences
from hf_unigd.retrieval.entries import EMBEDDING
from hf_unigd.retrieval.table import vectors_of
from index_cases import IMAGES, build, knowledge, questions
from tiny_models import make_vlm


def another_model():
    return UniGDForConditionalGeneration.from_vlm(make_vlm(seed=1).model)


def pixels(parts):
    return [part if isinstance(part, str) else part.tobytes() for part in parts]


def entries(index, *columns):
    """Columns of all entries, ordered by row and id."""
    batches = index.table.batches(sorted({*columns, "row", "id"}))
    rows = sorted((row for batch in batches for row in batch.to_pylist()), key=lambda row: (row["row"], row["id"]))
    return [row[columns[0]] if len(columns) == 1 else tuple(row[name] for name in columns) for row in rows]


def vectors(index):
    return torch.from_numpy(np.array(entries(index, EMBEDDING), np.float32))


def count_embedded(monkeypatch, model):
    """A list that grows by the number of sequences of each forward pass."""
    counts, embed = [], type(model).embed
    monkeypatch.setattr(
        type(model), "embed", lambda self, **batch: [embed(self, **batch), counts.append(len(batch["spans"]))][0]
    )
    return counts


def test_an_index_finds_its_own_rows_with_their_answers(llava, tmp_path):
    build(llava, tmp_path / "index")
    index = EmbeddingIndex.load(tmp_path / "index")
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
    expected = (
        embed_sequences(*llava, ["a small car"], show_progress=False)
        @ embed_sequences(*llava, questions(), show_progress=False).T
    )
    order = expected[0].argsort(descending=True)
    (hits,) = index.search(*llava, ["a small car"], k=5)
    assert [hit.score for hit in hits] == pytest.approx(expected[0, order].tolist(), abs=1e-5)
    assert [hit.row for hit in hits] == order.tolist()
    (rest,) = index.search(*llava, ["a small car"], k=2, offset=3)
    assert [hit.row for hit in rest] == order[3:].tolist()


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


def test_images_keep_the_bytes_of_their_source_or_are_left_out(llava, tmp_path):
    jpeg = io.BytesIO()
    IMAGES[1].save(jpeg, "JPEG")
    (tmp_path / "one.png").write_bytes(jpeg.getvalue())  # whatever its name says
    rows = Dataset.from_dict({"image": [str(tmp_path / "one.png")], "caption": ["what it is"]})
    (hit,) = build(llava, tmp_path / "index", rows).search(*llava, [[IMAGES[1]]], k=1)[0]
    assert hit.sequence_parts == [jpeg.getvalue()]
    assert hit.image.tobytes() == PILImage.open(jpeg).convert("RGB").tobytes()

    index = build(llava, tmp_path / "without", store_images=False)
    (hits,) = index.search(*llava, [[IMAGES[1], "what is it"]], k=1)
    assert hits[0].row == 2 and hits[0].score == pytest.approx(1, abs=1e-5)
    assert hits[0].sequence == ["what is it"] and hits[0].image is None


def test_a_matryoshka_prefix_is_searched_by_the_same_prefix(tmp_path):
    tiny = make_vlm()
    model = UniGDForConditionalGeneration.from_vlm(
        tiny.model, head_type="linear", embedding_dim=16, matryoshka_dims=[8]
    )
    pair = model, UniGDProcessor(tiny.processor)
    index = build(pair, tmp_path / "index", truncate_dim=8)
    assert index.width == 8
    expected = embed_sequences(*pair, questions(), truncate_dim=8, show_progress=False)
    torch.testing.assert_close(vectors(index), expected, atol=1e-5, rtol=0)
    assert [hits[0].row for hits in index.search(*pair, questions(), k=1)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"`truncate_dim=5` was not trained"):
        build(pair, tmp_path / "other", truncate_dim=5)
    assert not (tmp_path / "other").exists()


def test_one_window_of_images_is_in_memory(llava, tmp_path, monkeypatch):
    def living():
        return sum(issubclass(type(thing), PILImage.Image) for thing in gc.get_objects())

    monkeypatch.setattr("hf_unigd.bulk.work.WINDOW", 2)
    rows = knowledge(repeat=12)
    gc.collect()
    before, most = living(), []
    embed = type(llava[0]).embed
    monkeypatch.setattr(
        type(llava[0]), "embed", lambda self, **batch: [embed(self, **batch), most.append(living() - before)][0]
    )
    build(llava, tmp_path, rows, rows_per_part=30)
    assert len(most) == 30 and max(most) <= 20  # of 48 images; at most 5 in four rows, in a few forms each


def test_other_columns_are_metadata_and_filters(llava, tmp_path):
    languages, years = ["de", "en", "de", "en", "fr"], [1, 2, 3, 4, 5]
    index = build(llava, tmp_path / "index", knowledge(lang=languages, year=years))
    assert entries(index, "lang", "year") == list(zip(languages, years, strict=True))
    (hits,) = index.search(*llava, ["two blue dogs"], where="lang = 'de' AND year > 1")
    assert [(hit.row, hit.metadata) for hit in hits] == [(2, {"lang": "de", "year": 3})]
    (none,) = index.search(*llava, ["two blue dogs"], where="year > 5")
    assert none == []
    with pytest.raises(ValueError, match=r"The filter 'colour = 3' cannot be used: .*colour"):
        index.search(*llava, ["two blue dogs"], where="colour = 3")

    classes = knowledge().add_column("kind", [0, 1, 0, 1, 1]).cast_column("kind", ClassLabel(names=["cat", "dog"]))
    assert entries(build(llava, tmp_path / "classes", classes), "kind") == ["cat", "dog", "cat", "dog", "dog"]
    chosen = build(llava, tmp_path / "chosen", knowledge(lang=languages, year=years), metadata_columns=["year"])
    assert "lang" not in chosen.table.schema.names and entries(chosen, "year") == years

    with pytest.raises(ValueError, match=r"`metadata_columns`: there is no column `age` of single values, only lang"):
        build(llava, tmp_path / "bad", knowledge(lang=languages), metadata_columns=["age"])
    with pytest.raises(ValueError, match=r"The rows have a column `id`, and so has every index.*`id_column`"):
        build(llava, tmp_path / "bad", knowledge(id=languages))
    with pytest.raises(ValueError, match="a column `lang` of string, and the index has no such column"):
        build(llava, tmp_path / "chosen", knowledge(lang=languages), source="others")


def test_rows_are_added_replaced_and_deleted_by_their_ids(llava, tmp_path, monkeypatch):
    first, second = knowledge().select([0, 1]), knowledge(repeat=2).select([7, 9])
    assert len(build(llava, tmp_path, first.add_column("name", ["a", "b"]), id_column="name")) == 2
    counts = count_embedded(monkeypatch, llava[0])
    build(llava, tmp_path, second.add_column("name", ["c", "d"]), id_column="name")
    changed = knowledge(repeat=3).select([14, 10]).add_column("name", ["b", "e"])
    counts.clear()
    index = build(llava, tmp_path, changed, id_column="name", replace=True)
    assert sum(counts) == 2
    assert sorted(entries(index, "id")) == ["a", "b", "c", "d", "e"]
    assert index.search(*llava, ["two blue dogs 2"], k=1)[0][0].id == "b"

    assert index.delete(ids=["a", "e", "nobody's"]) == 2
    assert index.delete(where="id = 'b'") == 1
    assert sorted(entries(EmbeddingIndex.load(tmp_path), "id")) == ["c", "d"] == sorted(entries(index, "id"))
    assert len(index.search(*llava, ["two blue dogs 2"], k=5)[0]) == 2
    with pytest.raises(ValueError, match="Give the `ids` of the entries to delete, or a filter"):
        index.delete()
    with pytest.raises(ValueError, match="cannot be used"):
        index.delete(where="no condition")


def test_ids_are_names_and_numbers_or_a_column(llava, tmp_path, caplog):
    build(llava, tmp_path / "index", source="one")
    index = build(llava, tmp_path / "index", knowledge(repeat=2), source="two")
    assert len(index) == 15 and {"one/4", "two/9"} <= set(entries(index, "id"))
    with pytest.raises(ValueError, match=r"Row 0 is another one than the index has with the id 'one/0'.*`source`"):
        build(llava, tmp_path / "index", knowledge().select([4, 3, 2, 1, 0]), source="one")
    with pytest.raises(ValueError, match="Rows 1 and 3 have the same id 'b' in `name`"):
        build(llava, tmp_path / "new", knowledge(name=["a", "b", "c", "b", "d"]), id_column="name")
    with pytest.raises(RowError, match="Row 2 has no id in the column `name`"):
        build(llava, tmp_path / "new", knowledge(name=["a", "b", None, "c", "d"]), id_column="name")
    with pytest.raises(ValueError, match="`id_column`: there is no column `key`"):
        build(llava, tmp_path / "new", id_column="key")


def test_streams_are_indexed_and_go_on(llava, tmp_path, monkeypatch):
    index = build(llava, tmp_path, knowledge(repeat=2).select(range(6)).to_iterable_dataset())
    assert entries(index, "id") == [f"rows/{number}" for number in range(6)]
    counts = count_embedded(monkeypatch, llava[0])
    index = build(llava, tmp_path, knowledge(repeat=2).to_iterable_dataset(), num_workers=1)
    assert sum(counts) == 4
    monkeypatch.undo()
    whole = build(llava, tmp_path / "whole", knowledge(repeat=2))
    torch.testing.assert_close(vectors(index), vectors(whole), atol=1e-5, rtol=0)


def test_workers_make_the_same_index(llava, tmp_path):
    one = build(llava, tmp_path / "one", knowledge(repeat=4), rows_per_part=3)
    two = build(llava, tmp_path / "two", knowledge(repeat=4), rows_per_part=3, num_workers=2)
    assert entries(one, "sequence", "answer") == entries(two, "sequence", "answer")
    torch.testing.assert_close(vectors(one), vectors(two), atol=1e-5, rtol=0)


def test_texts_find_what_embeddings_do_not(llava, tmp_path):
    """The untrained model ranks by chance; words rank the entry that has them first."""
    rows = Dataset.from_dict({"anchor": [f"a {word} on the green grass" for word in ("cat", "zebra", "dog", "car")]})
    index = build(llava, tmp_path, rows)
    (similar,) = index.search(*llava, ["zebra"], k=4)
    (fused,) = index.search(*llava, ["zebra"], k=4, hybrid=True)
    ranks = {hit.id: rank for rank, hit in enumerate(similar, 1)}
    expected = {key: 1 / (60 + rank) + (1 / 61 if key == "rows/1" else 0) for key, rank in ranks.items()}
    assert [hit.id for hit in fused] == sorted(expected, key=lambda key: -expected[key])
    assert index.search(*llava, ["zebra"], k=1, hybrid=True, where="row > 1")[0][0].row > 1


def test_the_first_search_of_texts_beside_a_writer_reads_the_latest_version(llava, tmp_path):
    """It makes an index of the texts, with which the table moves on: the vectors must follow."""
    rows = Dataset.from_dict({"anchor": [f"a {word} on the green grass" for word in ("cat", "zebra", "dog", "car")]})
    reader = build(llava, tmp_path, rows)
    reader.search(*llava, ["zebra"])
    writer = EmbeddingIndex.load(tmp_path)
    writer.delete(where="row = 1")
    writer.table.optimize()
    (hits,) = reader.search(*llava, ["zebra"], hybrid=True)
    assert sorted(hit.row for hit in hits) == [0, 2, 3]


@pytest.mark.parametrize("precision", ["float16", "int8", "binary"])
def test_rounded_vectors_are_scored_by_the_whole_ones(llava, tmp_path, precision):
    build(llava, tmp_path, knowledge(repeat=4))
    index = EmbeddingIndex.load(tmp_path, precision=precision)
    query = embed_sequences(*llava, ["a red cat"], show_progress=False)
    exact = (query @ vectors(index).T)[0].tolist()
    (hits,) = index.nearest(query, k=5)
    assert [hit.score for hit in hits] == pytest.approx([exact[hit.row] for hit in hits], abs=1e-6)
    assert hits[0].row == int(np.argmax(exact))
    with pytest.raises(ValueError, match="`precision` must be one of float32"):
        EmbeddingIndex.load(tmp_path, precision="int4")


def test_what_does_not_fit_into_memory_is_searched_on_disk(llava, tmp_path, caplog):
    build(llava, tmp_path, knowledge(repeat=4))
    in_memory, on_disk = EmbeddingIndex.load(tmp_path), EmbeddingIndex.load(tmp_path, memory_share=0)
    for where in (None, "row < 7"):
        pairs = [index.search(*llava, questions(), k=4, where=where) for index in (in_memory, on_disk)]
        assert [[hit.row for hit in hits] for hits in pairs[0]] == [[hit.row for hit in hits] for hits in pairs[1]]
    assert caplog.text.count("so each search reads them again") == 1


def test_an_approximate_index_is_made_kept_and_removed(llava, tmp_path):
    rows = knowledge(repeat=60)
    index = build(llava, tmp_path, rows, ann="IVF_FLAT")
    assert index.table.ann == "IVF_FLAT"
    with pytest.raises(ValueError, match=r"`precision=int8` rounds vectors in memory, and .* approximate index, IVF_"):
        EmbeddingIndex.load(tmp_path, precision="int8")
    version = index.table._table.version
    assert build(llava, tmp_path, rows, ann="IVF_FLAT").table._table.version == version  # it is not made again
    assert [hits[0].score for hits in index.search(*llava, questions(), k=1)] == pytest.approx([1] * 5, abs=1e-5)
    assert build(llava, tmp_path, rows).table.ann == "IVF_FLAT"
    assert build(llava, tmp_path, rows, ann=None).table.ann is None
    with pytest.raises(ValueError, match="`ann` must be one of auto, none, IVF_FLAT"):
        build(llava, tmp_path, rows, ann="HNSW32")


def test_an_export_has_every_column(llava, tmp_path):
    index = build(llava, tmp_path / "index", knowledge(lang=["de", "en", "de", "en", "fr"]))
    index.export(tmp_path / "entries.parquet")
    table = pq.read_table(tmp_path / "entries.parquet")
    assert table.schema.names == index.table.schema.names
    order = np.argsort(table["row"].to_numpy())
    torch.testing.assert_close(torch.tensor(vectors_of(table[EMBEDDING])[order]), vectors(index))


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
    assert len(EmbeddingIndex.load(tmp_path / "index")) == 12  # what is there can be searched

    counts = count_embedded(monkeypatch, llava[0])
    resumed = build(llava, tmp_path / "index", knowledge(repeat=4), rows_per_part=3)
    assert "Going on: of 20 rows, the index has 12" in caplog.text
    assert sum(counts) == 8  # what was missing
    monkeypatch.undo()
    whole = build(llava, tmp_path / "whole", knowledge(repeat=4))
    assert entries(resumed, "id") == entries(whole, "id") == [f"rows/{number}" for number in range(20)]
    torch.testing.assert_close(vectors(resumed), vectors(whole), atol=1e-5, rtol=0)


def test_a_finished_index_embeds_nothing_again(llava, tmp_path, monkeypatch):
    build(llava, tmp_path)
    counts = count_embedded(monkeypatch, llava[0])
    assert len(build(llava, tmp_path)) == 5
    assert not counts


def test_a_model_is_probed_once(llava, tmp_path, monkeypatch):
    build(llava, tmp_path)
    index, probes = EmbeddingIndex.load(tmp_path), []
    monkeypatch.setattr("hf_unigd.retrieval.description.probe", lambda *pair: [probe(*pair), probes.append(pair)][0])
    for _ in range(3):
        index.search(*llava, ["a cat"], k=1)
    assert len(probes) == 1


def test_another_model_is_refused_by_search_and_by_adding(llava, tmp_path):
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


def test_other_settings_are_refused_unless_it_starts_anew(llava, tmp_path):
    build(llava, tmp_path)
    with pytest.raises(ValueError, match=r"`store_images` was True, now False.*`--overwrite true`"):
        build(llava, tmp_path, store_images=False)
    assert len(build(llava, tmp_path, knowledge(repeat=2), store_images=False, overwrite=True)) == 10


def test_a_folder_of_something_else_is_left_alone(llava, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds other files, and no index"):
        build(llava, tmp_path, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_bad_searches_say_why(llava, tmp_path):
    index = build(llava, tmp_path / "index")
    assert len(index.search(*llava, ["a"], k=6)[0]) == 5
    with pytest.raises(ValueError, match="`k=0` must be at least 1"):
        index.search(*llava, ["a"], k=0)
    with pytest.raises(ValueError, match="`offset=-1`"):
        index.search(*llava, ["a"], offset=-1)
    with pytest.raises(ValueError, match="width 3, but the index holds vectors of 32"):
        index.nearest(torch.eye(3), k=1)
    with pytest.raises(ValueError, match="holds no index; `hf-unigd index"):
        EmbeddingIndex.load(tmp_path)
    assert not (tmp_path / "entries.lance").exists()
    index.delete(where="row >= 0")
    assert index.search(*llava, ["a"], k=1) == [[]]


def test_a_table_that_says_nothing_of_its_model_is_refused(tmp_path):
    import lancedb

    lancedb.connect(tmp_path).create_table("entries", [{"id": "1", "embedding": [1.0]}])
    with pytest.raises(ValueError, match="does not say which model it was made with"):
        EmbeddingIndex.load(tmp_path)


def test_datasets_that_make_no_index_are_refused(llava, tmp_path):
    with pytest.raises(ValueError, match="has no rows"):
        build(llava, tmp_path, knowledge().select([]))
    with pytest.raises(ValueError, match=r"No accepted row format has the columns \['caption'\]"):
        build(llava, tmp_path, Dataset.from_dict({"caption": ["a"]}))
    assert not list(tmp_path.iterdir())


def test_bad_rows_are_named_or_skipped_and_tried_again(llava, tmp_path, caplog, monkeypatch):
    picture = tmp_path / "good.png"
    IMAGES[0].save(picture)
    rows = Dataset.from_dict(
        {
            "image": [str(picture), str(picture), str(tmp_path / "late.png"), None, str(picture)],
            "caption": ["a", "b", "c", None, "e"],
            "anchor": [None, None, None, "an <image> in a text", None],
        }
    )
    with pytest.raises(RowError, match=r"Row 2 has a missing image: there is no file .*late\.png"):
        build(llava, tmp_path / "index", rows, rows_per_part=2)
    assert len(EmbeddingIndex.load(tmp_path / "index")) == 2
    index = build(llava, tmp_path / "index", rows, rows_per_part=2, skip_bad_rows=True)
    assert entries(index, "row") == [0, 1, 4]
    assert "Row 3 has the reserved token '<image>'" in caplog.text
    assert "Skipped 2 of 3 rows" in caplog.text
    IMAGES[1].save(tmp_path / "late.png")
    counts = count_embedded(monkeypatch, llava[0])
    index = build(llava, tmp_path / "index", rows, rows_per_part=2, skip_bad_rows=True)
    assert entries(index, "row") == [0, 1, 2, 4] and sum(counts) == 1  # the row that is good now
    with pytest.raises(ValueError, match="None of the 1 rows can be used"):
        build(llava, tmp_path / "none", rows.select([3]), skip_bad_rows=True)


def test_tampered_entries_open_no_file_and_win_nothing(llava, tmp_path, caplog):
    build(llava, tmp_path / "index")
    index = EmbeddingIndex.load(tmp_path / "index")
    everything = index.table._table.to_arrow()
    bad = everything.slice(0, 3).to_pylist()
    for number, (row, scale) in enumerate(zip(bad, (0.0, 1000.0, 1.0), strict=True)):
        row |= {"id": f"bad{number}", EMBEDDING: [scale * value for value in row[EMBEDDING]]}
    bad[2]["sequence"] = [{"text": None, "image": str(tmp_path / "secret.png").encode()}]
    IMAGES[0].save(tmp_path / "secret.png")
    index.table._table.add(bad)
    index.refresh()
    (hits,) = index.search(*llava, [questions()[2]], k=8)
    assert "Left out: 2 of 8 entries, whose embeddings are not unit vectors" in caplog.text
    assert {hit.id for hit in hits}.isdisjoint({"bad0", "bad1"}) and len(hits) == 6
    forged = next(hit for hit in hits if hit.id == "bad2")
    with pytest.raises(ValueError, match="a corrupt image: cannot identify"):
        _ = forged.image
    on_disk = EmbeddingIndex(index.table, memory_share=0)
    assert {hit.id for hit in on_disk.search(*llava, [questions()[2]], k=8)[0]}.isdisjoint({"bad0", "bad1"})
    with pytest.raises(ValueError, match="holds embeddings that are not unit vectors"):
        EmbeddingIndex.load(tmp_path / "index")


def test_batches_of_an_engine_are_added_once(llava, tmp_path, monkeypatch):
    rows = knowledge(repeat=2, name=[f"n{number}" for number in range(10)], year=list(range(10)))
    build(llava, tmp_path / "index", rows.select([3]), id_column="name")
    adder = RowAdder(*llava, tmp_path / "index", "name", skip_bad_rows=True)
    listed = [dict(row) for row in rows]
    counts = count_embedded(monkeypatch, llava[0])
    assert adder.add(listed[:6]) == 5 and adder.add([*listed[4:], {"name": "bad"}], first=4) == 4
    assert sum(counts) == 9
    monkeypatch.undo()
    index, whole = EmbeddingIndex.load(tmp_path / "index"), build(llava, tmp_path / "whole", rows, id_column="name")
    assert dict(entries(index, "id", "year")) == dict(entries(whole, "id", "year"))
    ours, expected = (dict(entries(each, "id", EMBEDDING)) for each in (index, whole))
    assert ours.keys() == expected.keys() and len(index) == 10
    for key, vector in ours.items():
        assert vector == pytest.approx(expected[key], abs=1e-5)
    assert adder.add([]) == 0
    with pytest.raises(ValueError, match="another model"):
        RowAdder(another_model(), llava[1], tmp_path / "index", "name")


def test_the_description_survives_every_change(llava, tmp_path):
    index = build(llava, tmp_path)
    before = json.dumps(index.description.probe)
    index.delete(where="row = 1")
    index.table.optimize()
    build(llava, tmp_path, knowledge(repeat=2), source="more")
    assert json.dumps(EmbeddingIndex.load(tmp_path).description.probe) == before

"""Benchmarks of answers: by the position of what is asked about, and with and without retrieval."""

import json
import re
import sys
from dataclasses import replace
from itertools import cycle

import pytest

import benchmark_files
from evaluation_cases import HashEmbedder, Speaker
from hf_unigd.cli.main import main
from hf_unigd.evaluation.answer_measures import choice_accuracy, nearest_choice, rouge_l, vqa_accuracy, yes_or_no
from hf_unigd.evaluation.benchmark_data import BenchmarkData, read_benchmark
from hf_unigd.evaluation.benchmarking import run_benchmark
from hf_unigd.evaluation.benchmarks import load_benchmarks
from hf_unigd.evaluation.embedders import CannotMeasureError
from hf_unigd.evaluation.matches import ImageSettings
from hf_unigd.evaluation.protocols import PROTOCOLS
from hf_unigd.evaluation.results import ResultsFile
from hf_unigd.evaluation.tsv_images import TsvImages
from tiny_models import make_image, make_vlm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions")
    for write in ("vizwiz", "scienceqa", "fvqa", "webqa", "demon"):
        getattr(benchmark_files, f"write_{write}")(path)
    return path


def measured(name, folder, embedder):
    file = ResultsFile(None, embedder.description, [])
    return run_benchmark(embedder, load_benchmarks()[name], folder, file, show_progress=False)


def in_memory(rows, knowledge=None):
    knowledge = None if knowledge is None else BenchmarkData(knowledge, ImageSettings(), {})
    return BenchmarkData(rows, ImageSettings(), {}, knowledge=knowledge)


def test_the_accuracy_of_vqa_leaves_each_person_out_once():
    answers = ["cat"] * 4 + ["A dog."] * 3 + ["don't know"] * 2 + ["2"]
    same = {"Cat": "cat", "the dog": "A dog.", "dont know": "don't know", "two!": "2", "red": None}
    for said, given in same.items():
        shares = [min((answers[:left] + answers[left + 1 :]).count(given) / 3, 1) for left in range(10)]
        assert vqa_accuracy()(said, {"answers": answers}) == pytest.approx(sum(shares) / 10), said
    assert vqa_accuracy()("dog", {"answers": answers}) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy()("1.5", {"answers": ["1.5"] * 10}) == 1
    assert vqa_accuracy()("15", {"answers": ["1.5"] * 10}) == 0
    assert vqa_accuracy()("1000", {"answers": ["1,000"] * 10}) == 1


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("B", 1),
        ("B.", 1),
        ("The answer is B, not A.", 1),
        ("A", 0),
        ("a dog", 0),
        ("D, or B", 1),
        ("Blue", 0),
        ("", 0),
    ],
)
def test_a_choice_is_a_single_letter_of_one_of_the_choices(said, score):
    assert choice_accuracy()(said, {"choices": ["red", "blue", "green"], "answer": 1}) == score


def test_rouge_l_by_hand():
    score = rouge_l()
    # The longest common subsequence is "the cat on mat": 4 of 5 words of both.
    assert score("The cat sat on mat.", {"answers": ["the cat on the mat"]}) == pytest.approx(0.8)
    # Precision 1/4 and recall 1/1.
    assert score("it is a bark", {"answers": ["bark"]}) == pytest.approx(2 * 0.25 / 1.25)
    assert score("bark", {"answers": ["nothing", "bark"]}) == 1
    assert score("barks", {"answers": ["bark"]}) == 0  # without stemming
    assert score("", {"answers": ["bark"]}) == 0


def test_yes_and_no_are_words():
    assert [yes_or_no(text) for text in ("Yes.", "It is: NO", "nothing, yesterday", "no, yes")] == [
        "yes", "no", None, "no"
    ]  # fmt: skip


def test_each_question_is_asked_with_the_relevant_picture_at_each_position():
    rows = [
        {
            "text": f"Is it {row}?",
            "answer": answer,
            "images": [make_image(10 * row + place) for place in range(3)],
            "captions": [f"right {row}", f"wrong {row} 1", f"wrong {row} 2"],
        }
        for row, answer in enumerate(("yes", "no"))
    ]
    speaker = Speaker(["Yes.", "no", "yes", "no", "it is", "No"])
    scores, counts = PROTOCOLS["answer_positions"](speaker, in_memory(rows), instruction="Yes or No.")
    assert {name: each.metric for name, each in scores.items()} == {
        "position_1_accuracy": 1.0,
        "position_2_accuracy": 0.0,
        "position_3_accuracy": 1.0,
        "accuracy": pytest.approx(4 / 6),
    }
    assert counts == {"items": 2, "questions": 6, "neither_yes_nor_no": 1}
    assert scores["accuracy"].groups.tolist() == [0, 0, 0, 1, 1, 1]
    for place, asked in enumerate(speaker.asked):
        row, position = divmod(place, 3)
        others = [f"wrong {row} 1", f"wrong {row} 2"]
        assert re.findall(r"(?:right|wrong) \d(?: \d)?", asked) == [
            *others[:position], f"right {row}", *others[position:]
        ]  # fmt: skip
        assert f"Is it {row}? Yes or No." in asked
    rows[1]["captions"] = rows[1]["captions"][:2]
    with pytest.raises(ValueError, match="Row 1 has 3 images and 2 captions"):
        PROTOCOLS["answer_positions"](speaker, in_memory(rows), instruction="")


def test_pictures_stand_at_the_places_of_their_captions():
    """The first picture of a row goes with its caption to each position."""
    row = {"text": "Is it?", "answer": "yes", "images": [make_image(0), make_image(1)], "captions": ["one", "two"]}
    speaker = Speaker(cycle(["yes"]))
    read = []
    process = speaker.processor.process_sequences
    speaker.processor.process_sequences = lambda sequences, **kwargs: [
        read.extend(sequences),
        process(sequences, **kwargs),
    ][1]
    PROTOCOLS["answer_positions"](speaker, in_memory([row]), instruction="Say.")
    pixels = [image.tobytes() for image in row["images"]]
    assert [[part if isinstance(part, str) else pixels.index(part.tobytes()) for part in parts] for parts in read] == [
        [0, "one", 1, "two", "Is it? Say."],
        [1, "two", 0, "one", "Is it? Say."],
    ]


def test_answers_with_retrieval_read_other_rows_and_never_their_own():
    own = {"text": "What is this?", "image": make_image(0), "answers": ["cat"] * 10, "answer": "own"}
    other = {**own, "image": make_image(1), "answer": "other"}
    speaker = Speaker(["a cat", "dog"])  # the first with retrieval
    scores, counts = PROTOCOLS["retrieval_answers"](
        speaker, in_memory([own], [own, other]), measure="vqa_accuracy", instruction="In a word.", k=3
    )
    assert {name: each.metric for name, each in scores.items()} == {
        "vqa_accuracy": 0.0,
        "vqa_accuracy_with_retrieval": 1.0,
    }
    assert counts == {"items": 1, "entries": 1, "questions_left_out_of_the_entries": 1}
    retrieved, alone = speaker.asked
    assert "Reference information: What is this? other\n" in retrieved and "own" not in retrieved
    assert "What is this?\nIn a word." in retrieved and "Reference" not in alone and "In a word." in alone
    with pytest.raises(ValueError, match="All 1 rows of the knowledge are questions of the benchmark"):
        PROTOCOLS["retrieval_answers"](speaker, in_memory([own], [own]), measure="vqa_accuracy")
    with pytest.raises(ValueError, match="no `knowledge`"):
        PROTOCOLS["retrieval_answers"](speaker, in_memory([own]), measure="vqa_accuracy")


def test_a_bad_row_of_the_knowledge_is_named():
    question = {"text": "a cat", "answers": ["cat"]}
    knowledge = [question, {"text": "a dog"}, {"text": "an <image> in a text"}]
    with pytest.raises(ValueError, match="Row 2 of the knowledge has 1 image placeholders"):
        PROTOCOLS["retrieval_answers"](Speaker([]), in_memory([question], knowledge), measure="rouge_l")
    broken = [{"text": "a dog", "image": b"no picture"}]
    with pytest.raises(ValueError, match="Row 0 has a corrupt image"):
        PROTOCOLS["retrieval_answers"](Speaker([]), in_memory([question], broken), measure="rouge_l")


def test_vizwiz_retrieves_from_its_training_split(folder):
    speaker = Speaker(cycle(["cat", "dog", "bird"]))
    result = measured("vizwiz", folder, speaker)
    # Of five rows to train, one has the text and the picture of a question; another has the text alone.
    assert result.counts == {"items": 3, "entries": 4, "questions_left_out_of_the_entries": 1}
    assert result.metrics["vqa_accuracy"] == pytest.approx((1 + 0.9 + 0) / 3)
    assert result.dataset["knowledge"] == {"files": ["train.json"], "rows": 5}
    assert result.dataset["settings"]["measure"] == "vqa_accuracy"
    retrieved = speaker.asked[:3]
    assert all(asked.count(" cat\n") == 3 for asked in retrieved)  # three entries with the most frequent answer
    assert all("single word or phrase." in asked for asked in speaker.asked)


def test_scienceqa_asks_for_a_letter(folder):
    speaker = Speaker(["A", "A", "B", "B"])
    result = measured("scienceqa", folder, speaker)
    assert result.metrics == {"choice_accuracy": 0.5, "choice_accuracy_with_retrieval": 0.5}
    first = (
        "Context: It barks.\nWhich test animal is it?\nA. a cat\nB. a dog\nC. a star\nAnswer with the option's letter"
    )
    assert first in speaker.asked[2]
    assert "B. a dog C. a star B. a dog\n" in speaker.asked[0]  # an entry in a line, with its answer
    assert result.counts["entries"] == 2


def test_fvqa_asks_what_facts_answer_and_retrieves_facts(folder):
    data = read_benchmark(load_benchmarks()["fvqa"], folder)
    assert [row["text"] for row in data.rows] == ["What can animal 0 do?", "What can animal 2 do?"]
    assert [row["text"] for row in data.knowledge.rows] == [f"animal {place} can bark" for place in range(3)]
    assert data.counts == {"left_out": 1}
    result = measured("fvqa", folder, Speaker(["bark", "it can bark", "no", "no"]))
    assert result.metrics == {"rouge_l": 0.0, "rouge_l_with_retrieval": pytest.approx((1 + 0.5) / 2)}
    benchmark = load_benchmarks()["fvqa"]
    with pytest.raises(ValueError, match="no question with the `ans_source` 'web', only KB, image, kb"):
        read_benchmark(replace(benchmark, data={**benchmark.data, "answer_source": "web"}), folder)


def test_webqa_retrieves_pictures_of_all_of_its_questions(folder):
    data = read_benchmark(load_benchmarks()["webqa"], folder)
    assert [row["text"] for row in data.rows][-1] == "How large is it?" and len(data.rows) == 5
    assert data.rows[0]["answers"] == ["Yes, the cat is red."]
    assert sorted(row["image"] for row in data.knowledge.rows) == [30000000 + place for place in range(8)]
    assert data.knowledge.open(0, "image").tobytes() == make_image(60).convert("RGB").tobytes()
    speaker = Speaker(cycle(["It is as large as a dog."]))
    result = measured("webqa", folder, speaker)
    assert result.counts == {"items": 5, "entries": 8, "questions_left_out_of_the_entries": 0}
    assert result.scores["rouge_l"].values[-1] == 1
    assert all(len(re.findall(r"a cat \d", asked)) == 3 for asked in speaker.asked[:5])
    benchmark = load_benchmarks()["webqa"]
    knowledge = {**benchmark.knowledge, "data": {**benchmark.knowledge["data"], "sample": 2}}
    fewer = replace(benchmark, data={**benchmark.data, "sample": 2}, knowledge=knowledge)
    drawn, again = (read_benchmark(fewer, folder) for _ in range(2))
    assert len(drawn.rows) == 2 and [*drawn.rows] == [*again.rows]
    # The knowledge is that of the questions that are drawn.
    records = json.loads((folder / "webqa" / "WebQA_train_val.json").read_text())
    facts = [
        each for row in drawn.rows for name in ("pos", "neg") for each in records[row["text"]][f"img_{name}Facts"]
    ]
    assert {row["image"] for row in drawn.knowledge.rows} == {each["image_id"] for each in facts}


def test_answering_shows_its_progress(capsys):
    rows = [{"image": make_image(place), "question": "Is it?", "answer": "yes"} for place in range(3)]
    PROTOCOLS["yes_no"](Speaker(["yes"] * 3), in_memory(rows), True)
    assert "Answering: 100%" in (shown := capsys.readouterr().err) and "3/3" in shown
    PROTOCOLS["yes_no"](Speaker(["yes"] * 3), in_memory(rows), False)
    assert "Answering" not in capsys.readouterr().err


def test_webqa_positions_are_of_yes_no_questions_with_one_picture_that_helps(folder):
    data = read_benchmark(load_benchmarks()["webqa_positions"], folder)
    assert [(row["text"], row["answer"]) for row in data.rows] == [
        ("Is the cat red?", "yes"),
        ("Is the dog blue?", "no"),
    ]
    assert data.counts == {"left_out": 2}
    assert data.rows[1]["images"] == [30000002, 30000003, 30000004, 30000005, 30000006, 30000007]
    assert data.rows[0]["captions"] == [f"a cat {place}" for place in range(6)]
    result = measured("webqa_positions", folder, Speaker(["yes"] * 6 + ["yes", "no"] * 3))
    assert [result.metrics[f"position_{each}_accuracy"] for each in range(1, 7)] == [0.5, 1, 0.5, 1, 0.5, 1]
    assert result.counts == {"left_out": 2, "items": 2, "questions": 12, "neither_yes_nor_no": 0}


def test_images_in_lines_are_found_by_their_ids(folder, tmp_path):
    images = TsvImages.of(folder / "webqa" / "imgs.tsv")
    for place in (0, 7):
        assert images.open(30000000 + place).tobytes() == make_image(60 + place).convert("RGB").tobytes()
    with pytest.raises(ValueError, match=r"has the image 30000008, which is not in .*imgs\.tsv"):
        images.open(30000008)
    with pytest.raises(ValueError, match="has the image 20000001"):
        images.open(20000001)
    benchmark_files.write_webqa(tmp_path)
    (tmp_path / "webqa" / "imgs.lineidx").unlink()
    with pytest.raises(ValueError, match=r"WebQA cannot be read: .*imgs\.lineidx.* It needs: WebQA_train_val"):
        read_benchmark(load_benchmarks()["webqa"], tmp_path)


def test_what_is_missing_is_said_before_anything_is_answered(folder, monkeypatch):
    for name in ("vizwiz", "webqa_positions"):
        with pytest.raises(CannotMeasureError, match="hash does not generate"):
            measured(name, folder, HashEmbedder())
    speaker = Speaker([])
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match=r"rouge-score: `pip install 'hf-unigd\[evaluation\]'`"):
        measured("fvqa", folder, speaker)
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(ImportError, match=r"hf-unigd\[retrieval\]"):
        measured("vizwiz", folder, speaker)
    assert speaker.asked == []


@pytest.mark.parametrize(
    ("said", "score"),
    [("Two dogs.", 1), ("I see dogs", 1), ("a red cat", 0), ("cat and cat, and dogs", 0), ("none", 0), ("", 0)],
)
def test_the_nearest_choice_is_found_by_its_words(said, score):
    assert nearest_choice()(said, {"choices": ["a red cat", "two dogs", "people"], "answer": 1}) == score


def test_choices_that_are_pictures_are_told_apart_by_a_letter():
    row = {"choices": ["Image A", "Image B"], "answer": 1}
    said = {"Image B": 1, "It must be image B": 1, "Image A": 0, "C": 0}
    assert {text: nearest_choice()(text, row) for text in said} == said


def test_demon_puts_pictures_where_its_texts_name_them(folder):
    data = read_benchmark(load_benchmarks()["demon"], folder)
    rows = {row["category"]: row for row in data.rows}
    assert len(rows) == len(data.rows) == 29
    story, cloze, panel = rows["VIST"], rows["RecipeQA_TextCloze"], rows["COMICS_Panel"]
    assert story["parts"] == ["Tell it.", 0, "Caption: a cat.", 1, "Question:"]
    assert story["choices"] is None and rows["ALFRED"]["choices"] is None and story["answers"] == ["two dogs"]
    assert cloze["parts"][-1] == "Question: Choice list:['a cat', 'two dogs', 'people']. Your answer is:"
    assert cloze["choices"] == ["a cat", "two dogs", "people"] and cloze["answer"] == 1
    assert panel["choices"] == ["Image A", "Image B"] and panel["answer"] == 1
    assert panel["parts"] == ["Tell it. Choice List:['Image A:", 0, "', ' Image B:", 1, "']Your answer is:"]
    assert story["images"] == ["VIST/core/images/0.jpg", "VIST/core/images/1.jpg"]


def test_demon_scores_texts_by_rouge_l_and_choices_by_the_nearest(folder):
    result = measured("demon", folder, Speaker(cycle(["two dogs and two cats"])))
    # Precision 2/5, recall 1.
    assert result.metrics["VIST_score"] == result.metrics["ALFRED_score"] == pytest.approx(2 * 0.4 / 1.4)
    assert result.metrics["TQA_score"] == 1 and result.metrics["COMICS_Panel_score"] == 0
    assert result.metrics["score"] == pytest.approx((11 * 0.8 / 1.4 + 15) / 29)
    assert result.counts == {"items": 29, "without_an_answer": 0}


def test_a_question_that_is_too_long_gets_no_answer():
    rows = [
        {"parts": [text, 0], "images": [make_image(0)], "choices": None, "answer": None, "answers": ["a cat"]}
        for text in ("a cat " * 2000, "what is it?")
    ]
    speaker = Speaker(["a cat"])
    scores, counts = PROTOCOLS["interleaved_answers"](speaker, in_memory(rows))
    assert scores["score"].values.tolist() == [0, 1] and counts == {"items": 2, "without_an_answer": 1}
    assert len(speaker.asked) == 1
    rows[1]["parts"] = ["an <image> in a text"]
    with pytest.raises(ValueError, match=r"In the batch that begins with question 0: .*<image>"):
        PROTOCOLS["interleaved_answers"](Speaker([]), in_memory(rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choice_list": ["a cat"]}, "sample 0 of TQA has the answer 'two dogs', which is none of its choices: a cat"),
        ({"context": "{image#3}"}, "sample 0 of TQA names picture 3 of 2"),
        ({"choice_list": None}, "sample 0 of TQA has no `choice_list`"),
    ],
)
def test_questions_of_demon_that_cannot_be_scored_are_named(tmp_path, change, message):
    benchmark_files.write_demon(tmp_path)
    file = tmp_path / "demon" / "TQA" / "core" / "core.json"
    content = json.loads(file.read_text())
    instance = content["data"][0]["task_instance"] | change
    content["data"][0]["task_instance"] = {name: value for name, value in instance.items() if value is not None}
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_benchmark(load_benchmarks()["demon"], tmp_path)


def test_demon_says_what_has_to_be_fetched_by_hand(tmp_path):
    for folder in (None, tmp_path):
        with pytest.raises(
            ValueError, match=r"DEMON \(core\) cannot be read: .* It needs: DEMON-Core of the Google Drive"
        ):
            read_benchmark(load_benchmarks()["demon"], folder)


def test_a_group_goes_without_what_was_not_fetched(tmp_path, caplog, capsys):
    tiny = make_vlm()
    tiny.model.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    benchmark_files.write_mmvp(tmp_path / "data")
    call = ["evaluate", str(tmp_path), "--benchmark_folder", str(tmp_path / "data"), "--benchmarks"]
    main([*call, "sugar"])
    printed = capsys.readouterr().out
    assert "mmvp_vlm: " in printed and "webqa: " not in printed and "Table 7" in printed
    assert "DEMON (core) is left out: " in caplog.text and "It needs: WebQA_train_val.json" in caplog.text
    with pytest.raises(SystemExit, match="WebQA cannot be read"):
        main([*call, "sugar", "webqa"])

"""Questions about icons: every answer that is learned is true, and right answers are counted by hand."""

import random

import pytest

from hf_unigd.data import load_icons
from hf_unigd.quickstart import questions
from hf_unigd.quickstart.questions import (
    KINDS,
    Neighbours,
    Question,
    answer_accuracy,
    question_rows,
    search_rows,
    show_answers,
)
from hf_unigd.retrieval.answering import INSTRUCTION


@pytest.fixture(scope="module")
def icons():
    return load_icons("train", size=24).select(range(0, 6000, 40))


def test_every_answer_is_true(icons):
    stored, asked = icons.with_format(None), []
    for row, chat in zip(stored, question_rows(icons, seed=3)[:]["messages"], strict=True):
        for user, assistant in zip(chat[::2], chat[1::2], strict=True):
            question, answer = user["content"][-1]["text"], assistant["content"]
            words = row["icon"].split("_")
            if question.startswith("Is there "):
                assert answer == ("yes" if question.removeprefix("Is there ").removesuffix("?") in words else "no")
                asked.append(answer)
            else:
                expected = {
                    "What is it?": " ".join(words),
                    "Which colour is it?": row["attributes"]["colour"],
                    "How large is it?": row["attributes"]["size"],
                }
                assert answer == expected[question]
                asked.append(question)
    assert {"yes", "no", "What is it?", "Which colour is it?", "How large is it?"} == set(asked)
    assert 0.3 < asked.count("yes") / (asked.count("yes") + asked.count("no")) < 0.7


def test_half_of_the_chats_ask_behind_entries_of_other_icons(icons):
    chats = question_rows(icons, seed=0)[:]["messages"]
    names = {name.replace("_", " ") for name in icons.with_format(None)["icon"]}
    for number, chat in enumerate(chats):
        parts = chat[0]["content"]
        if number % 2:
            assert [part["type"] for part in parts] == ["image", "text"] and len(chat) == 2 * len(KINDS)
            continue
        assert [part["type"] for part in parts] == ["text", "image", "text"] and len(chat) == 2
        instruction, entries = parts[0]["text"][: len(INSTRUCTION)], parts[0]["text"][len(INSTRUCTION) :].strip()
        captions = [line.split(", a ")[0].split() for line in entries.split("\n")]
        assert all(words[: len(words) // 2] * 2 == words for words in captions)  # of the short and of the long caption
        told = {" ".join(words[: len(words) // 2]) for words in captions}
        assert instruction == INSTRUCTION and len(told) == 3 and told <= names
        assert icons.with_format(None)["icon"][number].replace("_", " ") not in told
    again = question_rows(icons, seed=0)[5:6]["messages"][0]
    assert [turn["content"] for turn in again[1:]] == [turn["content"] for turn in chats[5][1:]]


def test_searches_show_the_icon_whose_name_they_find(icons):
    rows = search_rows(icons, seed=1)
    shown = rows[:]
    assert shown["positive"] == [name.replace("_", " ") for name in icons.with_format(None)["icon"]]
    assert all(
        image.tobytes() == icon.tobytes() for (image, _), icon in zip(shown["anchor"], icons[:]["image"], strict=True)
    )
    asked = {"Is there" if question.startswith("Is there ") else question for _, question in shown["anchor"]}
    assert asked == {"What is it?", "Which colour is it?", "How large is it?", "Is there"}
    assert rows[7]["anchor"][1] == shown["anchor"][7][1]  # whatever it is read with


def test_neighbours_share_the_most_words():
    found = Neighbours(["arrow_up", "arrow_up_bold", "arrow_left", "home", "home_up"]).of(
        "arrow_up_box", 4, random.Random(0)
    )
    assert set(found[:2]) == {"arrow_up", "arrow_up_bold"} and set(found[2:]) == {"arrow_left", "home_up"}
    alone = Neighbours(["arrow_up", "home"]).of("zebra", 2, random.Random(0))
    assert sorted(alone) == ["arrow_up", "home"]


def test_right_answers_are_counted(capsys):
    said = [("arrow left", "arrow up", True), ("arrow left", "left", False), ("red", "red", True), ("red", "", False)]
    asked = [
        Question("arrow_left", KINDS[place // 2], "?", answer, {"alone": text, "with retrieval": answer})
        for place, (answer, text, _) in enumerate(said)
    ]
    assert [each.is_right("alone") for each in asked] == [right for *_, right in said]
    asked += [Question("arrow_left", kind, "?", "no", {"alone": "no", "with retrieval": "yes"}) for kind in KINDS[2:]]
    accuracy = answer_accuracy(asked)
    assert accuracy["answers_what_it_is_alone"] == accuracy["answers_its_colour_alone"] == 0.5
    assert accuracy["answers_its_size_with_retrieval"] == 0
    assert accuracy["answers_all_alone"] == pytest.approx(4 / 6)
    assert accuracy["answers_all_with_retrieval"] == pytest.approx(4 / 6)
    asked = [
        Question(f"icon_{n}", kind, f"{kind} {n}?", "a", dict.fromkeys(questions.WAYS, "a"))
        for n in range(6)
        for kind in KINDS
    ]
    show_answers(asked, answer_accuracy(asked))
    printed = capsys.readouterr().out
    assert "answers about 6 of these icons" in printed and printed.count("100.0%") == 10
    for line in ("icon 0: what it is 0?", "icon 2: its colour 2?", "icon 4: its size 4?"):
        assert line in printed

"""Files of benchmarks with a few rows of their real schemas."""

import base64
import csv
import io
import json

from datasets import Dataset, DatasetDict, Features, Image, Sequence, Value

from tiny_models import make_image


KINDS = ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att")
CATEGORIES = (
    "Orientation and Direction",
    "Presence of Specific Features",
    "State and Condition",
    "Quantity and Count",
    "Positional and Relational Context",
    "Color and Appearance",
    "Structural Characteristics",
    "Texts",
    "Viewpoint and Perspective",
)


def write_all(folder):
    """Writes the files of every benchmark that reads files, as the user would fetch them."""
    write_karpathy(folder, "flickr30k", "dataset_flickr30k.json", "flickr30k_images")
    write_karpathy(folder, "coco", "dataset_coco.json", "coco/val2014")
    write_nocaps(folder)
    write_sugarcrepe(folder)
    write_sugarcrepe_pp(folder)
    write_winoground(folder)
    write_mmvp(folder)
    write_vist(folder)
    write_vizwiz(folder)
    write_scienceqa(folder)
    write_fvqa(folder)
    write_webqa(folder)
    write_demon(folder)


def save_images(folder, names, first=0):
    for place, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        make_image(first + place).save(file, quality=95)


def write_json(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_karpathy(folder, name, file, images, count=4):
    """Karpathy's `dataset_*.json`, with an image of another split."""
    listed = []
    for place in range(count + 1):
        ids = [5 * place + number for number in range(5)]
        sentences = [
            {"tokens": ["a", "cat"], "raw": f"A cat {place} {number}.", "imgid": place, "sentid": each}
            for number, each in enumerate(ids)
        ]
        listed.append(
            {
                "sentids": ids,
                "imgid": place,
                "sentences": sentences,
                "split": "test" if place < count else "train",
                "filename": f"{place}.png",
                **({"filepath": "val2014", "cocoid": 100 + place} if name == "coco" else {}),
            }
        )
    write_json(folder / name / file, {"images": listed, "dataset": name})
    save_images(folder / images, [f"{place}.png" for place in range(count)])  # those of other splits are not needed


def write_nocaps(folder):
    domains = ["in-domain", "near-domain", "near-domain", "out-domain", "near-domain"]
    images = [
        {"id": place, "file_name": f"{place}.png", "open_images_id": f"{place:016x}", "width": 24, "height": 20}
        | {"license": 0, "coco_url": "https://example.org", "date_captured": "2018-11-06", "domain": domain}
        for place, domain in enumerate(domains)
    ]
    annotations = [
        {"image_id": place, "id": 10 * place + number, "caption": f"A dog {place} {number}."}
        for place in range(5)
        for number in range(10)
    ]
    content = {"images": images, "annotations": annotations, "licenses": [], "info": {}}
    write_json(folder / "nocaps" / "nocaps_val_4500_captions.json", content)
    save_images(folder / "nocaps", [f"{place}.png" for place in range(5)])


def write_sugarcrepe(folder):
    for kind in KINDS:
        rows = {
            str(place): {
                "filename": f"{place:012d}.jpg",
                "caption": f"A {kind} {place}.",
                "negative_caption": f"No {kind} {place}.",
            }
            for place in range(2)
        }
        write_json(folder / "sugarcrepe" / f"{kind}.json", rows)
    save_images(folder / "coco/val2017", [f"{place:012d}.jpg" for place in range(2)])


# The configurations of Aman-J/SugarCrepe_pp.
SUGARCREPE_PP = {
    "replace_obj": "replace_object",
    "replace_att": "replace_attribute",
    "replace_rel": "replace_relation",
    "swap_obj": "swap_object",
    "swap_att": "swap_atribute",
}


def write_sugarcrepe_pp(folder):
    for kind, configuration in SUGARCREPE_PP.items():
        rows = [
            {
                "id": place,
                "filename": f"{place:012d}.jpg",
                "caption": f"A {kind} {place}.",
                "caption2": f"One {kind} {place}.",
                "negative_caption": f"No {kind} {place}.",
            }
            for place in range(2)
        ]
        Dataset.from_list(rows).save_to_disk(str(folder / "sugarcrepe_pp" / configuration))
    save_images(folder / "coco/val2017", [f"{place:012d}.jpg" for place in range(2)])


def write_winoground(folder):
    text = Value("string")
    features = {"id": Value("int64"), "image_0": Image(), "image_1": Image(), "caption_0": text, "caption_1": text}
    rows = {
        "id": [0, 1],
        "image_0": [make_image(0), make_image(2)],
        "image_1": [make_image(1), make_image(3)],
        "caption_0": ["a cat sees a dog", "two"],
        "caption_1": ["a dog sees a cat", "three"],
        "tag": ["Relation"] * 2,
        "secondary_tag": [""] * 2,
        "num_main_preds": [1] * 2,
        "collapsed_tag": ["Relation"] * 2,
    }
    more = {"tag": text, "secondary_tag": text, "num_main_preds": Value("int64"), "collapsed_tag": text}
    Dataset.from_dict(rows, features=Features(features | more)).save_to_disk(str(folder / "winoground"))


def write_mmvp(folder):
    names = []
    (folder / "mmvp_vlm").mkdir(parents=True, exist_ok=True)
    with (folder / "mmvp_vlm" / "Questions.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["Question ID", "Type", "Statement"])
        for place, category in enumerate(CATEGORIES):
            for number in (2 * place + 1, 2 * place + 2):
                lines.writerow([number, category, f"a cat {number}"])
                names.append(f"{category}/{number}.jpg")
    save_images(folder / "mmvp_vlm" / "MLLM_VLM Images", names)


def write_vist(folder, stories=3):
    """Stories of five pictures, and one of which a picture is missing."""
    annotations = []
    for story in range(stories + 1):
        for order in (2, 0, 1, 4, 3):  # not in their order, as nobody promises it
            part = {
                "original_text": f"Scene {order} of {story}.",
                "text": f"scene {order} of {story} .",
                "album_id": "1",
                "photo_flickr_id": str(100 * story + order),
                "setting": "first-2-pick-and-tell",
                "worker_id": "w",
                "story_id": str(story),
                "tier": "story-in-sequence",
                "worker_arranged_photo_order": order,
                "storylet_id": str(5 * story + order),
            }
            annotations.append([part])
    images = [{"id": str(100 * story + order)} for story in range(stories + 1) for order in range(5)]
    content = {"images": images, "albums": [], "annotations": annotations, "info": {}, "type": "stories"}
    write_json(folder / "vist" / "val.story-in-sequence.json", content)
    ids = [100 * story + order for story in range(stories + 1) for order in range(5)][:-1]
    for place, each in enumerate(ids):
        save_images(folder / "vist/images", [f"{each}.{'png' if place % 2 else 'jpg'}"], place)


def write_vizwiz(folder, questions=3):
    """VizWiz's annotations: three questions to validate, and five to train, the first of which is one of the three."""
    for split, count in (("val", questions), ("train", questions + 2)):
        records = []
        for place in range(count):
            shared = place == 0
            answers = ["cat"] * 6 + ["a dog"] * 3 + [f"unsuitable {split}"]
            records.append(
                {
                    "answerable": 1,
                    "image": f"VizWiz_{split}_{place:08d}.jpg",
                    "question": "What is this?" if shared or place == 1 else f"What is it in {split} {place}?",
                    "answer_type": "other",
                    "answers": [{"answer": each, "answer_confidence": "yes"} for each in answers],
                }
            )
            # Of the two questions with the same text, one has the same picture too.
            first = 70 if shared else 70 + 10 * len(split) + place
            save_images(folder / "vizwiz" / split, [records[-1]["image"]], first)
        write_json(folder / "vizwiz" / f"{split}.json", records)


def write_scienceqa(folder):
    text = Value("string")
    names = ("task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")
    features = Features(
        {
            "image": Image(),
            "question": text,
            "choices": Sequence(text),
            "answer": Value("int8"),
            "hint": text,
            **dict.fromkeys(names, text),
        }
    )
    splits = {}
    for split, first in (("train", 20), ("validation", 30), ("test", 40)):
        rows = {
            "image": [make_image(first + place) for place in range(2)],
            "question": [f"Which {split} animal is it?", "Which is it?"],
            "choices": [["a cat", "a dog", "a star"], ["red", "blue"]],
            "answer": [1, 0],
            "hint": ["It barks.", ""],
            **{name: ["", ""] for name in names},
        }
        splits[split] = Dataset.from_dict(rows, features)
    DatasetDict(splits).save_to_disk(str(folder / "scienceqa"))


def write_fvqa(folder):
    facts = {
        f"conceptnet/e/{place}": {
            "KB": "conceptnet",
            "e1": f"/c/en/animal_{place}",
            "e2": "/c/en/bark",
            "e1_label": f"animal {place}",
            "e2_label": "bark",
            "r": "/r/CapableOf",
            "surface": f"[[animal {place % 3}]] can [[bark]]",  # a sentence may stand there twice
        }
        for place in range(4)
    }
    questions = {
        str(place): {
            "fact_surface": f"[[animal {place}]] can [[bark]]",
            "ans_source": source,
            "question": f"What can animal {place} do?",
            "kb_source": "conceptnet",
            "fact": [f"conceptnet/e/{place}"],
            "img_file": f"ILSVRC2012_test_{place:08d}.JPEG",
            "visual_concept": "obj",
            "answer": "bark",
            "question_id": str(place),
        }
        for place, source in enumerate(("kb", "image", "KB"))
    }
    write_json(folder / "fvqa" / "all_fact_triples_release.json", facts)
    write_json(folder / "fvqa" / "all_qs_dict_release.json", questions)
    save_images(folder / "fvqa" / "images", [each["img_file"] for each in questions.values()], 50)


def write_webqa(folder):
    """WebQA's questions: three yes/no questions with a picture that helps and six or fewer that do not, one about two
    pictures, one about a text, and one of the training split."""

    def facts(*places):
        return [
            {
                "image_id": 30000000 + place,
                "title": f"File {place}",
                "caption": f"a cat {place}",
                "url": "https://example.org",
                "imgUrl": "https://example.org",
            }
            for place in places
        ]

    def record(question, answer, category, right, wrong, split="val"):
        return {
            "Q": f'"{question}"',
            "A": [f'"{answer}"'],
            "topic": "animals",
            "split": split,
            "Qcate": category,
            "Guid": question,
            "img_posFacts": facts(*right),
            "img_negFacts": facts(*wrong),
            "txt_posFacts": [],
            "txt_negFacts": [],
        }

    records = [
        record("Is the cat red?", "Yes, the cat is red.", "YesNo", [0], range(1, 8)),
        record("Is the dog blue?", "No, the dog is green.", "YesNo", [2], range(3, 8)),
        record("Are there cats?", "Yes.", "YesNo", [0], [1, 2]),  # too few pictures
        record("Are both red?", "No, one is.", "YesNo", [0, 1], range(2, 8)),
        record("How large is it?", "It is as large as a dog.", "Others", [3], [4]),
        record("What do texts say?", "Nothing.", "text", [], []),
        record("Is it learned?", "Yes.", "YesNo", [0], range(1, 8), "train"),
    ]
    write_json(folder / "webqa" / "WebQA_train_val.json", {each["Guid"]: each for each in records})
    lines = []
    for place in range(8):
        encoded = io.BytesIO()
        make_image(60 + place).save(encoded, "PNG")
        lines.append(f"{30000000 + place}\t{base64.b64encode(encoded.getvalue()).decode()}\n")
    (folder / "webqa" / "imgs.tsv").write_text("".join(lines))
    starts = [sum(map(len, lines[:place])) for place in range(8)]
    (folder / "webqa" / "imgs.lineidx").write_text("".join(f"{start}\n" for start in starts))


DEMON = {
    "open-ended": [
        "MMCoQA",
        "AESOP",
        "DiDeMoSV",
        "FlintstonesSV",
        "PororoSV",
        "VIST",
        "IEdit",
        "Spot-the-Diff",
        "Birds-to-Words",
        "CLEVR-Change",
    ],
    "": ["ALFRED"],
    "multi-choice": [
        "COMICS_Dialogue",
        "COMICS_Panel",
        "RecipeQA_VisualCloze",
        "RecipeQA_TextCloze",
        "WebQA",
        "TQA",
        "MultiModalQA",
        "SlideVQA",
        "OCR-VQA",
        "DocVQA",
        "Fashion200K",
        "NLVR2",
        "nuscenes",
        "VizWiz",
        "MIT-States_StateCoherence",
        "MIT-States_PropertyCoherence",
        "VISION",
        "RecipeQA_ImageCoherence",
    ],
}


def write_demon(folder):
    """A question of each task. The choices of some are pictures, which the context names."""
    for kind, tasks in DEMON.items():
        for task in tasks:
            instance = {"context": "{image#1}Caption: a cat. {table#2} Question:", "images_path": ["0.jpg", "1.jpg"]}
            response = "two dogs"
            if task in ("COMICS_Panel", "RecipeQA_VisualCloze", "RecipeQA_ImageCoherence"):
                instance["context"] = "Choice List:['Image A: {image#1} ', ' Image B: {image#2} ']Your answer is: "
                response = "Image B"
            elif kind == "multi-choice":
                instance["choice_list"] = ["a cat", "two dogs", "people"]
            metadata = {"dataset": task, "split": "core", "num_sample": 1, "question_type": kind}
            sample = {"sample_id": 0, "task_instruction_id": 1, "task_instance": instance, "response": response}
            content = {"metadata": {**metadata, "task_instruction": ["Look.", "Tell it."]}, "data": [sample]}
            write_json(folder / "demon" / task / "core" / "core.json", content)
            save_images(folder / "demon" / task / "core" / "images", instance["images_path"], 80)

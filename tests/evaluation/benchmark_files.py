"""Files of benchmarks with a few rows of their real schemas."""

import csv
import json

from datasets import Dataset, Features, Image, Value

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


def write_sugarcrepe_pp(folder):
    for kind in KINDS[:5]:
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
        Dataset.from_list(rows).save_to_disk(str(folder / "sugarcrepe_pp" / kind))
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

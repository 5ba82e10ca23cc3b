"""Captioned images, indexes to mine in, and negatives found by brute force."""

import unicodedata
from io import BytesIO

import torch
from datasets import Dataset, Features, Image, Value

from hf_unigd.data import load_rows
from hf_unigd.retrieval import build_index, mine_negatives
from tiny_models import make_image


WORDS = ("red", "blue", "yellow", "green", "small", "large")
COUNT = 10
IMAGES = [make_image(place) for place in range(COUNT)]
TEXTS = [f"a {WORDS[place % 6]} cat and {place} {WORDS[place % 5]} dogs" for place in range(COUNT)]
# Captions of nothing among the images.
OTHERS = ["three people", "a car seen from the left", "green grass", "two windows", "the word", "a picture"]


def encoded(image, kind="JPEG", **settings):
    """Bytes that another encoding would not have."""
    file = BytesIO()
    image.save(file, kind, **({"quality": 40} if kind == "JPEG" else settings))
    return file.getvalue()


def captioned(count=COUNT, **columns):
    """Images in bytes with captions, and other columns."""
    rows = {
        "image": [{"bytes": encoded(image), "path": None} for image in IMAGES[:count]],
        "short_caption": TEXTS[:count],
        "score_of_taste": [place / 7 for place in range(count)],
        **columns,
    }
    features = {"image": Image(), "short_caption": Value("string"), "score_of_taste": Value("float64")}
    features |= {name: Value("string") for name in columns if name not in features}
    return Dataset.from_dict(rows, Features(features))


def build(pair, folder, rows, **kwargs):
    return build_index(*pair, rows, folder, show_progress=False, batch_size=4, **kwargs)


def texts_of(pair, folder, texts, **kwargs):
    return build(pair, folder, Dataset.from_dict({"anchor": texts}), **{"source": "texts", **kwargs})


def mine(pair, index, rows, output, **kwargs):
    settings = {"show_progress": False, "batch_size": 2, "rows_per_part": 4, **kwargs}
    return mine_negatives(*pair, index, rows, output, **settings)


def mined(folder):
    """The rows as they are stored."""
    rows = load_rows(str(folder))
    for name, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
    return rows.to_list()


def negatives_of(row):
    names = sorted((name for name in row if name.startswith("negative_")), key=lambda name: int(name[9:]))
    return [row[name] for name in names]


def embed(pair, sequences, side):
    """Each alone, with the instruction of its side."""
    model, processor = pair
    with torch.no_grad():
        batches = [processor.process_sequences([each], prompt_name=side) for each in sequences]
        return torch.cat([model.embed(**batch) for batch in batches])


def plain(text):
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def brute_force(pair, anchors, positives, entries, usable, rules):
    """
    The negatives of each anchor by comparing everything with everything, None where there are too few.

    `usable[row](place)` says whether an entry may be a negative of a row.
    """
    queries, documents = embed(pair, anchors, "query"), embed(pair, entries, "document")
    scores, positive_scores = queries @ documents.T, (queries * embed(pair, positives, "document")).sum(1)
    found = []
    for row in range(len(anchors)):
        candidates = [place for place in scores[row].argsort(descending=True).tolist() if usable(row, place)]
        positive = positive_scores[row].item()
        limit = min(
            rules.get("max_score", 2),
            positive - rules.get("absolute_margin", -4),
            positive - abs(positive) * rules["relative_margin"] if "relative_margin" in rules else 2,
        )
        count = rules.get("num_negatives", 3)
        looked_at = candidates[: rules.get("range_max", len(candidates))]
        left = [place for place in looked_at if rules.get("min_score", -2) <= scores[row, place] <= limit]
        left = left[rules.get("range_min", 0) :][:count]
        found.append(left if len(left) == count else None)
    return found

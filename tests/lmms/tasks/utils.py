"""What the local task asks."""

from PIL import Image


def images_of(row):
    return [Image.open(row["image"]).convert("RGB")]


def question_of(row, lmms_eval_specific_kwargs=None):
    return row["question"]


def hit(row, results):
    return {"said": float(bool(results[0])), "exact": float(results[0].strip() == row["answer"])}

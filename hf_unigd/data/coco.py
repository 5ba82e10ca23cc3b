"""Reads the captions of COCO, one row an image."""

from datasets import Dataset, List


def is_coco(rows: Dataset) -> bool:
    """Whether `datasets` made these rows of files such as COCO's captions: each holds all images and annotations."""
    annotations = rows.features.get("annotations")
    is_listed = isinstance(annotations, List) and isinstance(annotations.feature, dict)
    return "images" in rows.features and is_listed and {"id", "image_id", "caption"} <= annotations.feature.keys()


def coco_rows(files: Dataset) -> Dataset:
    """
    Rows of `image`, the name of the image's file, `caption`, the list of its captions, and the ids of both, `image_id`
    and `caption_id`.

    Args:
        files: A row for each file: `images`, dicts with `id` and `file_name`, and `annotations`, dicts with `id`,
            `image_id` and `caption` (https://cocodataset.org/#format-data).

    Raises:
        ValueError: a caption is that of an image which is not listed.
    """
    names: list[str] = []
    captions: list[list[str]] = []
    image_ids: list[int] = []
    caption_ids: list[list[int]] = []
    for file in files:
        of_image: dict[int, list[str]] = {image["id"]: [] for image in file["images"]}
        ids: dict[int, list[int]] = {image["id"]: [] for image in file["images"]}
        for annotation in file["annotations"]:
            if annotation["image_id"] not in of_image:
                raise ValueError(f"it has a caption of the image {annotation['image_id']}, which is not in `images`.")
            of_image[annotation["image_id"]].append(annotation["caption"])
            ids[annotation["image_id"]].append(annotation["id"])
        names += [image["file_name"] for image in file["images"]]
        captions += [of_image[image["id"]] for image in file["images"]]
        image_ids += [image["id"] for image in file["images"]]
        caption_ids += [ids[image["id"]] for image in file["images"]]
    return Dataset.from_dict({"image": names, "caption": captions, "image_id": image_ids, "caption_id": caption_ids})

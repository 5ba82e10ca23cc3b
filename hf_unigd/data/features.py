"""Reads rows with images that are not decoded yet, so that all images are opened in one way
([`~hf_unigd.data.images.open_image`]).
"""

from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, LargeList, List


def without_decoding(rows: Any) -> Any:
    """
    The same rows, whose `datasets.Image` columns hold `{"bytes": ..., "path": ...}` at any depth. Nothing is copied.
    Rows of another kind than those of `datasets`, and rows that a transform makes, are returned as they are.
    """
    features = getattr(rows, "features", None)
    if not features or _undecoded(features) == features:
        return rows
    if isinstance(rows, IterableDataset):
        # `decode(False)` would leave columns of mixed types (`datasets.Json`) as strings too.
        return rows.cast(Features(_undecoded(features)))
    if not isinstance(rows, Dataset) or rows.format["type"] == "custom":
        return rows
    info = rows.info.copy()
    info.features = Features(_undecoded(features))
    # `cast` would write all rows again, and `cast_column` knows no lists of images.
    plain = Dataset(rows.data, info, rows.split, indices_table=rows._indices, fingerprint=rows._fingerprint)
    return plain.with_format(columns=rows.format["columns"])


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, Image):
        return Image(mode=feature.mode, decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(each) for name, each in feature.items()}
    if isinstance(feature, LargeList):
        return LargeList(_undecoded(feature.feature))
    if isinstance(feature, List):
        return List(_undecoded(feature.feature), length=feature.length)
    return feature

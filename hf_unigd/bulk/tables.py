"""Rows of a dataset as a table, with their images as they are stored."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features
from datasets.features.features import require_storage_embed


def table_of_rows(rows: Sequence[Mapping[str, Any]], features: Features) -> pa.Table:
    """
    Args:
        rows: Values by column name, None for those that are missing. Images are not decoded.
        features: Those of the table.
    """
    columns = {name: [row.get(name) for row in rows] for name in features}
    # Images were read as they are stored. `from_dict` would drop the bytes of one whose path is that of a file here.
    stored = {name for name, feature in features.items() if require_storage_embed(feature)}
    others = Features({name: feature for name, feature in features.items() if name not in stored})
    encoded = Dataset.from_dict({name: columns[name] for name in others}, others).with_format("arrow")[:]
    schema = features.arrow_schema
    return pa.Table.from_arrays(
        [
            pa.array(columns[field.name], field.type) if field.name in stored else encoded[field.name]
            for field in schema
        ],
        schema=schema,
    )

"""Images in one large file of text lines, as WebQA is published."""

import base64
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .matches import ImageSettings


_FIRST_ID = 10_000_000  # ids count from a multiple of it


@dataclass(frozen=True)
class TsvImages(ImageSettings):
    """
    Images of a file `NAME.tsv`, each a line of its id and its bytes in base64. A file `NAME.lineidx` beside it has the
    place of each line; an image's line is its id modulo 10,000,000.

    Attributes:
        file: The file of the images.
        places: Where each line begins, in bytes.
    """

    file: Path = Path()
    places: list[int] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, file: Path) -> "TsvImages":
        """
        Raises:
            FileNotFoundError: one of both files is missing.
            ValueError: the second does not hold numbers.
        """
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}")
        return cls(file=file, places=[int(line) for line in file.with_suffix(".lineidx").read_text().split()])

    def open(self, value: Any) -> Any:
        """
        Args:
            value: The id of an image.

        Raises:
            ValueError: there is no such image, or it cannot be read. The message continues "Row 3 ...".
        """
        line = int(value) % _FIRST_ID
        found, content = b"", b""
        if line < len(self.places):
            with self.file.open("rb") as opened:
                opened.seek(self.places[line])
                found, _, content = opened.readline().strip().partition(b"\t")
        if found.decode() != str(value):
            raise ValueError(f"has the image {value}, which is not in {self.file}")
        return super().open(base64.b64decode(content))

"""Files of images and samples as published data sets have them."""

import io
import tarfile

from tiny_models import make_image


def jpeg(seed):
    """The bytes of a JPEG, which change if anybody decodes and encodes it again."""
    buffer = io.BytesIO()
    make_image(seed).save(buffer, "JPEG", quality=40)
    return buffer.getvalue()


def write_tar(file, samples):
    """WebDataset: the files of a sample follow each other and have its key as their name."""
    with tarfile.open(file, "w") as tar:
        for key, fields in samples.items():
            for suffix, content in fields.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

"""Awkward pictures: each is loaded as people see it, or its row is refused.

The whole attack runs over the images of Pillow's own tests, which are in its source distribution. The bounded one runs
over images made here: every mode, orientation and kind of transparency.
"""

import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import PIL
from PIL import ExifTags, Image, ImageOps
from transformers.image_utils import load_image

from attack.outcomes import Outcomes
from hf_unigd.data import RowError, RowParser
from hf_unigd.modeling import images_unigd


_UNTURNED = SimpleNamespace(exif_transpose=lambda image: image)
PLANTED = {
    "EXIF orientation is ignored": lambda: mock.patch.object(images_unigd, "ImageOps", _UNTURNED),
    "transparency is black": lambda: mock.patch.object(images_unigd, "_as_rgb", lambda image: image.convert("RGB")),
    "deep values are cut off": lambda: mock.patch.object(images_unigd, "_as_eight_bits", _cut_off),
    "there is no limit of the size": lambda: mock.patch.object(images_unigd, "MAX_PIXELS", 1 << 40),
}
MAX_PIXELS = images_unigd.MAX_PIXELS
DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def run(bounded: bool) -> Outcomes:
    outcomes = Outcomes("pictures")
    with tempfile.TemporaryDirectory() as folder:
        files = made_files(Path(folder)) if bounded else pillow_files(Path(folder))
        for file in files:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found, expected = loaded(file), reference(file)
            except Exception as error:
                outcomes.wrong.append(f"{file.name}: {type(error).__name__}: {error}"[:200])
                continue
            if found is None and expected is None:
                outcomes.refused += 1
            elif found is not None and expected is not None and is_same(found, expected):
                outcomes.right += 1
            else:
                outcomes.wrong.append(f"{file.name}: {describe(found)}, and should be {describe(expected)}")
    return outcomes


def loaded(file: Path) -> Image.Image | None:
    """What a row's image becomes, the same by its path and by its bytes; None if the row is refused."""
    parser = RowParser(len, max_image_pixels=images_unigd.MAX_PIXELS)
    images: list[Image.Image | None] = []
    for value in (str(file), file.read_bytes()):
        try:
            images.append(parser({"image": value, "caption": "a"}, 7).anchor[0]["content"][0]["image"])
        except RowError as error:
            if not str(error).startswith("Row 7 has ") or len(str(error)) > 500:
                raise AssertionError(f"the refusal does not say what is wrong: {error}") from error
            images.append(None)
    by_path, by_bytes = images
    if by_path is None or by_bytes is None:
        if by_path is not by_bytes:
            raise AssertionError("is refused by its path or by its bytes alone")
        return None
    if by_path.mode != "RGB" or by_path.tobytes() != by_bytes.tobytes():
        raise AssertionError("differs by its path and by its bytes")
    return by_path


def reference(file: Path) -> "np.ndarray | Image.Image | None":
    """What the image should become: an image where transformers loads it as it is seen, values of RGB where it is put
    on white, values of one channel where they are deep; None where it cannot be decoded or is too large."""
    try:
        image = Image.open(file)
        if not 0 < image.width * image.height <= MAX_PIXELS:
            return None
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation) in range(2, 9):
            image = ImageOps.exif_transpose(image)
        if image.mode in DEEP:
            return np.asarray(image).astype(np.float64)
        if not image.has_transparency_data:
            return load_image(image) if image.mode != "RGB" else image
        values = np.asarray(image.convert("RGBA")).astype(np.float64)
    except Exception:
        return None
    alpha = values[..., 3:] / 255
    return values[..., :3] * alpha + 255 * (1 - alpha)


def is_same(found: Image.Image, expected: "np.ndarray | Image.Image") -> bool:
    values = np.asarray(found)
    if isinstance(expected, Image.Image):
        return np.array_equal(values, np.asarray(expected))
    if expected.ndim == 3:
        return values.shape == expected.shape and np.abs(values - expected).max() <= 1
    return values.shape[:2] == expected.shape and keeps_values(values, expected)


def keeps_values(values: np.ndarray, deep: np.ndarray) -> bool:
    """Whether grey values are the deep ones if these are from 0 to 255, and otherwise rise with them and tell apart
    what lies far apart."""
    if deep.min() >= 0 and 1 < deep.max() <= 255:
        return bool(np.abs(values[..., 0] - deep).max() <= 1)
    order = np.argsort(deep, axis=None, kind="stable")
    grey, deep = values[..., 0].astype(int).ravel()[order], np.nan_to_num(deep.ravel()[order])
    shifted = deep - min(deep[0], 0)
    levels = len(np.unique(np.round(shifted * 255 / shifted[-1]))) if shifted[-1] else 1
    return bool((np.diff(grey) >= 0).all()) and len(np.unique(grey)) >= levels / 4  # of the next depth


def describe(image: "np.ndarray | Image.Image | None") -> str:
    if image is None:
        return "refused"
    size = f"{image.width} x {image.height}" if isinstance(image, Image.Image) else str(image.shape)
    return f"{size} of mean {np.asarray(image).mean():.1f}"


def pillow_files(folder: Path) -> Iterator[Path]:
    """The images of the tests of the installed Pillow."""
    download = ["pip", "download", "--quiet", "--no-deps", "--no-binary", "pillow", f"pillow=={PIL.__version__}"]
    subprocess.run([sys.executable, "-m", *download, "--dest", str(folder)], check=True)
    (archive,) = folder.glob("pillow-*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    archive.unlink()
    yield from sorted(file for file in folder.glob("pillow-*/Tests/images/**/*") if file.is_file())


def made_files(folder: Path) -> Iterator[Path]:
    """Images of every mode, orientation and kind of transparency, and files that are not images."""
    ramp = Image.linear_gradient("L").resize((12, 8))
    colours = Image.merge("RGB", (ramp, ramp.rotate(180), ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        colours.save(folder / f"turned-{orientation}.png", exif=exif)
    for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr"):
        colours.convert(mode).save(folder / f"mode-{mode}.{'png' if len(mode) < 4 else 'tiff'}")
    for mode in ("LA", "RGBA"):
        image = colours.convert(mode)
        image.putalpha(ramp)
        image.save(folder / f"alpha-{mode}.png")
    for mode, colour in (("L", 7), ("P", 7), ("RGB", (7, 7, 7))):
        image = Image.new("L", (9, 5), 7)
        image.paste(0, (2, 1, 4, 3))
        image.convert(mode).save(folder / f"key-{mode}.png", transparency=colour)
    deep = np.tile(np.arange(0, 65536, 257), (4, 1))
    Image.fromarray(deep.astype(np.uint16)).save(folder / "deep-16.png")
    Image.fromarray(deep.astype(np.int32) * 1000).save(folder / "deep-32.tiff")
    Image.fromarray((deep / 65535).astype(np.float32)).save(folder / "deep-float.tiff")
    Image.new("1", (9000, 9000)).save(folder / "bomb.png")
    buffer = BytesIO()
    colours.save(buffer, "PNG")
    (folder / "truncated.png").write_bytes(buffer.getvalue()[:-40])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    (folder / "surface.dds").write_bytes(b"DDS " + bytes(200))
    yield from sorted(folder.iterdir())


def _cut_off(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image).clip(0, 255).astype(np.uint8))

"""Every door opens an image in the same way: upright, on white, with its values, and not too large."""

import zlib
from io import BytesIO

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from transformers.image_utils import load_image

from hf_unigd import UniGDProcessor
from hf_unigd.cli.arguments import open_images
from hf_unigd.data import RowError, RowParser
from hf_unigd.data.images import open_image
from hf_unigd.modeling import SequenceError
from hf_unigd.modeling.images_unigd import open_image as open_source
from tiny_models import make_image, make_vlm


def saved(image, file, **kwargs):
    image.save(file, **kwargs)
    return file


def turned(orientation):
    """The EXIF of a photo that a camera, turned, stores in another orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def pixels(image):
    return np.asarray(image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_upright_through_every_door(tmp_path, orientation):
    file = saved(make_image(1, (24, 16)), tmp_path / "a.png", exif=turned(orientation))
    expected = load_image(str(file))
    assert expected.size == ((24, 16) if orientation < 5 else (16, 24))
    column = Dataset.from_dict({"image": [str(file)]}).cast_column("image", ImageFeature())
    doors = {
        "path": open_image(str(file)),
        "bytes": open_image(file.read_bytes()),
        "PIL": open_image(Image.open(file)),
        "undecoded": open_image({"bytes": file.read_bytes(), "path": None}),
        "datasets.Image": open_image(column[0]["image"]),
        "query": open_images([str(file)])[0],
    }
    for door, image in doors.items():
        assert np.array_equal(pixels(image), pixels(expected)), door
    processor = UniGDProcessor(make_vlm("llava").processor)
    by_hand, opened = (processor.process_sequences([[each]]) for each in (Image.open(file), expected))
    assert np.array_equal(by_hand["pixel_values"], opened["pixel_values"])


@pytest.mark.parametrize("source", ["path", "bytes"])
def test_an_image_in_rgb_is_not_copied_and_its_file_is_closed(tmp_path, source):
    file = saved(make_image(1), tmp_path / "a.jpg")
    given = Image.open(file if source == "path" else BytesIO(file.read_bytes()))
    opened = open_source(given)
    assert opened is given and opened.fp is None
    assert open_source(opened) is opened
    assert np.array_equal(pixels(opened), pixels(Image.open(file).convert("RGB")))


def test_an_image_of_several_frames_does_not_keep_its_file_open(tmp_path):
    frames = [make_image(1), make_image(2)]
    file = saved(frames[0], tmp_path / "a.tiff", save_all=True, append_images=frames[1:])
    assert type(open_image(str(file))) is Image.Image


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_are_as_transformers_loads_them(mode):
    image = make_image(2).convert(mode)
    assert np.array_equal(pixels(open_source(image)), pixels(load_image(image)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "RGB"])
def test_transparency_is_on_white(mode, tmp_path):
    """Black icons of different shapes on transparency are different images."""
    icons = []
    for place in (1, 5):
        icon = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
        icon.paste((0, 0, 0, 255), (place, place, place + 2, place + 2))
        if mode in ("P", "L", "RGB"):  # with a colour that stands for transparency
            shade = Image.new("L", icon.size, 7)
            shade.paste(0, (place, place, place + 2, place + 2))
            colour = (7, 7, 7) if mode == "RGB" else 7
            file = saved(shade.convert(mode), tmp_path / f"{place}.png", transparency=colour)
            icons.append(open_image(str(file)))
        else:
            image = icon.convert(mode)
            image.putalpha(icon.getchannel("A"))  # older Pillows lose it on the way to mode PA
            icons.append(open_source(image))
    for place, icon in zip((1, 5), icons, strict=True):
        assert icon.mode == "RGB" and not icon.has_transparency_data
        assert icon.getpixel((0, 7)) == (255, 255, 255) and icon.getpixel((place, place)) == (0, 0, 0)
    assert not np.array_equal(pixels(icons[0]), pixels(icons[1]))


@pytest.mark.parametrize(
    "ramp",
    [
        np.linspace(0, 65535, 256).astype(np.uint16),
        np.linspace(0, 65535, 256).astype(np.int32),
        np.linspace(-1e6, 1e6, 256).astype(np.int32),
        np.linspace(0, 1, 256, dtype=np.float32),
        np.linspace(0, 255, 256, dtype=np.float32),
        np.linspace(-3, 5, 256, dtype=np.float32),
    ],
    ids=["16 bits", "16 bits in 32", "32 bits", "0 to 1", "0 to 255", "any range"],
)
def test_a_ramp_of_deeper_values_stays_a_ramp(ramp, tmp_path):
    image = Image.fromarray(np.tile(ramp, (4, 1)))
    assert image.mode in ("I;16", "I", "F")
    expected = np.tile(np.arange(256), (4, 1))
    assert np.abs(pixels(open_source(image)).astype(int) - expected[..., None]).max() <= 1
    if image.mode != "F":
        return
    file = saved(image, tmp_path / "a.tiff")
    assert np.array_equal(pixels(open_image(str(file))), pixels(open_source(image)))


def test_an_rgb_image_is_handed_on_as_it_is():
    image = make_image(1)
    assert open_source(image) is image


def png_of(width, height):
    """A PNG file that claims a size and holds a black square of it, in a few kilobytes."""
    rows = zlib.compress(bytes((width + 1) * height), 9) if width * height <= 1 << 28 else b""

    def chunk(name, data):
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch):
    data = png_of(9000, 9000)
    decoded = []
    monkeypatch.setattr(Image.Image, "load", lambda *_: decoded.append(1))
    with pytest.raises(ValueError, match="9000 x 9000 pixels, more than 64000000"):
        open_image(data)
    with pytest.raises(ValueError, match=r"300000 x 300000 pixels|Pillow refuses"):
        open_image(png_of(300_000, 300_000))
    assert not decoded
    parser = RowParser(len, max_image_pixels=100)
    with pytest.raises(
        RowError,
        match=r"Row 7 has an image of 24 x 20 pixels, more than 100\. Resize it, or raise `max_image_pixels`\.$",
    ):
        parser({"image": make_image(1), "short_caption": "a cat"}, 7)


@pytest.mark.parametrize("image", [Image.new("RGB", (0, 0)), Image.new("L", (5, 0))])
def test_an_empty_image_is_refused(image):
    with pytest.raises(ValueError, match="has an empty image"):
        open_image(image)
    with pytest.raises(SequenceError, match="Sequence 0 has an empty image"):
        UniGDProcessor(make_vlm("llava").processor).process_sequences([[image]])


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"DDS " + bytes(200),
        b"\x89PNG\r\n\x1a\n" + bytes(30),
        b"GIF89a" + bytes(7),
        b"BM" + bytes(60),
        "a" * 5000,
        "a\0b",
    ],
)
def test_what_is_not_an_image_is_refused(value):
    with pytest.raises(ValueError, match=r"has a corrupt image|has a missing image|path cannot be used"):
        open_image(value)


@pytest.mark.parametrize("path", ["../secret.png", "{outside}/secret.png", "inside/../../secret.png", "link.png"])
def test_no_path_leaves_the_image_folder(path, tmp_path):
    folder = tmp_path / "images"
    (folder / "inside").mkdir(parents=True)
    saved(make_image(1), tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="has an image outside `image_folder`"):
        open_image(path.format(outside=tmp_path), folder)
    saved(make_image(1), folder / "inside" / "a.png")
    assert open_image("inside/a.png", folder).size == (24, 20)
    assert open_image(str(folder / "inside" / "a.png"), folder).size == (24, 20)


def test_bytes_of_every_common_format_are_read():
    for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        file = BytesIO()
        make_image(1).save(file, name)
        assert open_image(file.getvalue()).size == (24, 20), name

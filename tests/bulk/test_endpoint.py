"""Captions by a server of the OpenAI API."""

import threading

import pytest
from datasets import Dataset, Image
from PIL import Image as PILImage

from bulk_cases import arguments
from endpoint_server import serving
from hf_unigd.bulk.captioners import QUESTIONS
from hf_unigd.cli.main import main
from hf_unigd.data import load_rows


@pytest.fixture
def rows(tmp_path):
    """Images whose red tells them apart, of which the last lies on its side."""
    images = []
    for place in range(6):
        image = PILImage.new("RGB", (16, 8), (40 * place, 0, 0))
        exif = image.getexif()
        if place == 5:
            exif[0x0112] = 6  # turn by a quarter
        image.save(tmp_path / f"{place}.jpg", exif=exif, quality=95)
        images.append(str(tmp_path / f"{place}.jpg"))
    Dataset.from_dict({"image": images}).cast_column("image", Image()).save_to_disk(str(tmp_path / "rows"))
    return tmp_path / "rows"


def call(rows, url, output, **kwargs):
    kwargs = {"kind": "short", "dataset_name": rows, "output": output, "model": "m", "endpoint": url, **kwargs}
    return ["caption", *arguments(**kwargs)]


def place_of(image):
    return round(image.convert("RGB").getpixel((0, 0))[0] / 40)


def test_requests_are_sent_at_once_and_again_when_they_fail(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    together = threading.Barrier(3, timeout=20)

    def answer(number, image):
        if number < 3:
            together.wait()  # for as many as `batch_size`
            return [(500, "broken"), (429, "slow down"), (503, "starting")][number]
        return 200, f" cat {place_of(image)} of {image.width} x {image.height}\n"

    with serving(answer) as endpoint:
        main(call(rows, endpoint.url, tmp_path / "out", batch_size=3, temperature=0.5))
    captions = [f"cat {place} of 16 x 8" for place in range(5)] + ["cat 5 of 8 x 16"]
    assert load_rows(str(tmp_path / "out"))["short_caption"] == captions
    assert len(endpoint.requests) == 9 and endpoint.most_at_once == 3
    request = endpoint.requests[0]
    assert request["path"] == "/v1/chat/completions" and request["key"] == "Bearer secret"
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("m", 24, 0.5)
    assert request["messages"][0]["content"][1] == {"type": "text", "text": QUESTIONS["short"]}


def test_an_image_that_the_server_refuses_is_a_bad_row(rows, tmp_path, caplog):
    with serving(lambda _, image: (400, "too red") if place_of(image) == 4 else (200, "a cat")) as endpoint:
        command = call(rows, endpoint.url, tmp_path / "out")
        with pytest.raises(SystemExit, match=r"Row 4 is refused by http://127.*too red"):
            main(command)
        main([*command, "--skip_bad_rows", "true"])
    assert len(load_rows(str(tmp_path / "out"))) == 5 and "Skipped: Row 4" in caplog.text


def test_a_server_that_refuses_everything_is_named(rows, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    refused = pytest.raises(SystemExit, match=r"`--endpoint http://127.*no such key.*OPENAI_API_KEY")
    with serving(lambda *_: (401, "no such key")) as endpoint, refused:
        main(call(rows, endpoint.url, tmp_path / "out"))
    monkeypatch.setattr("hf_unigd.bulk.endpoint._RETRIES", 0)
    with pytest.raises(SystemExit, match=r"`--endpoint http://127.*Connection error"):
        main(call(rows, endpoint.url, tmp_path / "out"))
    assert not list(tmp_path.glob("out/.parts/part-*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--endpoint", "http://x"], "`--endpoint` needs `--model`"),
        (["--endpoint", "http://x", "--model", "m", "--dtype", "float16"], "`--dtype` is for a model that is loaded"),
    ],
)
def test_arguments_that_do_not_go_together(rows, tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message):
        main(["caption", "short", "--dataset_name", str(rows), "--output", str(tmp_path / "out"), *flags])

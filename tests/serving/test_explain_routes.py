"""`/v1/alignment` and `/v1/summary_tokens`, against the functions of `hf-unigd explain` and the backbone's scores."""

import base64
from io import BytesIO

import openai
import pytest
import torch
from PIL import Image

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.data import ExampleDataset, RowParser, SentenceSplitter
from hf_unigd.evaluation.alignment import align_slices, embed_slices
from index_cases import IMAGES
from serving_cases import NAME, image_part, serving, text_part
from tiny_models import make_vlm


@pytest.fixture(scope="module")
def pair():
    tiny = make_vlm()
    processor = UniGDProcessor(tiny.processor, instructions={"query": "Find it."})
    return UniGDForConditionalGeneration.from_vlm(tiny.model), processor


@pytest.fixture(scope="module")
def server(pair):
    with serving(*pair) as running:
        yield running


def post(server, path, **body):
    return server.client().post(path, body={"model": NAME, **body}, cast_to=object)


def test_an_alignment_is_that_of_explain(server, pair):
    contents = ["<image>A red cat. Two blue dogs.", "three people. <image>"]
    rows = [
        {"images": [image], "messages": [{"role": "user", "content": content}]}
        for image, content in zip(IMAGES, contents, strict=False)
    ]
    splitter = SentenceSplitter()
    parser = RowParser(len, 0, 1000, splitter=splitter)
    a, b = (ExampleDataset(rows, parser)[place] for place in range(2))
    posterior, similarity = align_slices(*(embed_slices(*pair, example, splitter) for example in (a, b)))

    bodies = {
        "a": [image_part(IMAGES[0]), text_part("A red cat. Two blue dogs.")],
        "b": [text_part("three people."), image_part(IMAGES[1])],
    }
    found = post(server, "/alignment", **bodies)
    assert found["similarity"] == pytest.approx(similarity, abs=1e-5)
    assert torch.allclose(torch.tensor(found["posterior"]), posterior, atol=1e-5)
    assert [part.get("text") for part in found["a"]] == [None, "A red cat.", "Two blue dogs."]
    assert [part.get("text") for part in found["b"]] == ["three people.", None]
    assert found["figure"] is None
    kind, _, data = post(server, "/alignment", **bodies, figure=True)["figure"].partition(";base64,")
    assert kind == "data:image/png"
    assert min(Image.open(BytesIO(base64.b64decode(data))).size) > 100


@pytest.mark.parametrize("instruction", [None, "Name it."])
def test_summary_tokens_are_the_likeliest_after_the_prompt(server, pair, instruction):
    model, processor = pair
    asked = {} if instruction is None else {"instruction": instruction}
    content = [text_part("a red cat"), image_part(IMAGES[0])]
    found = post(server, "/summary_tokens", input=content, k=4, **asked)["data"]
    inputs = processor.process_sequences(
        [["a red cat", IMAGES[0]]], prompted=True, instruction=[instruction or "Find it."]
    )
    del inputs["spans"]
    with torch.inference_mode():
        probabilities = model(**inputs).logits[0, -1].softmax(-1)
    values, ids = probabilities.topk(4)
    assert [each["probability"] for each in found] == pytest.approx(values.tolist(), rel=1e-4)
    assert [each["token"] for each in found] == [repr(processor.tokenizer.decode([token]))[1:-1] for token in ids]


def test_summary_tokens_before_training_are_those_of_the_other_model(pair, server):
    tiny = make_vlm(seed=1)
    other = UniGDForConditionalGeneration.from_vlm(tiny.model).eval(), UniGDProcessor(tiny.processor)
    with serving(*pair, before=other) as running:
        found = post(running, "/summary_tokens", input="a red cat")
    assert found["data"] == post(server, "/summary_tokens", input="a red cat")["data"]
    with serving(*other) as running:
        alone = post(running, "/summary_tokens", input="a red cat")
    assert alone["before"] is None
    assert found["before"] == alone["data"] != found["data"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/alignment", {"a": "a cat"}, "`b`"),
        ("/alignment", {"a": "a cat", "b": ""}, "`b` holds an empty text"),
        ("/alignment", {"a": "a cat " * 2000, "b": "a"}, "`a` has .* tokens"),
        ("/summary_tokens", {"input": ""}, "`input` holds an empty text"),
        ("/summary_tokens", {"input": "a", "prompt_name": "other"}, "no instruction 'other'"),
        ("/summary_tokens", {"input": "a", "k": 0}, "`k`"),
    ],
)
def test_what_cannot_be_explained_is_refused(server, path, body, message):
    with pytest.raises(openai.BadRequestError, match=message):
        post(server, path, **body)

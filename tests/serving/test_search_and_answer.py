"""`/v1/search` and `/v1/answer`, against the index and `answer_with_retrieval`."""

import base64
from io import BytesIO

import openai
import pytest
from PIL import Image

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.retrieval import answer_with_retrieval, build_index
from index_cases import IMAGES, knowledge, questions
from serving_cases import NAME, image_part, serving, text_part
from tiny_models import make_vlm


@pytest.fixture(scope="module")
def pair():
    tiny = make_vlm()
    processor = UniGDProcessor(tiny.processor, instructions={"query": "Find it."})
    return UniGDForConditionalGeneration.from_vlm(tiny.model), processor


@pytest.fixture(scope="module")
def index(pair, tmp_path_factory):
    rows = knowledge(lang=["de", "en", "de", "en", "de"])
    return build_index(*pair, rows, tmp_path_factory.mktemp("i") / "index", model_name="m", show_progress=False)


@pytest.fixture(scope="module")
def server(pair, index):
    with serving(*pair, index) as running:
        yield running


def as_content(sequence):
    parts = sequence if isinstance(sequence, list) else [sequence]
    return [text_part(part) if isinstance(part, str) else image_part(part) for part in parts]


def post(server, path, **body):
    return server.client().post(path, body={"model": NAME, **body}, cast_to=object)


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize(
    "settings", [{"k": 3}, {"k": 2, "offset": 1, "hybrid": True}, {"where": "lang = 'de'"}, {"instruction": "Hm."}]
)
def test_search_finds_what_the_index_finds(server, pair, index, place, settings):
    query = questions()[place]
    found = post(server, "/search", query=as_content(query), **settings)["data"]
    (wanted,) = index.search(*pair, [query], **settings)
    assert [entry["id"] for entry in found] == [hit.id for hit in wanted]
    assert [entry["score"] for entry in found] == pytest.approx([hit.score for hit in wanted], abs=1e-5)
    assert [entry["metadata"] for entry in found] == [dict(hit.metadata) for hit in wanted]
    texts = [[part.get("text") for part in entry["content"] + entry["answer"]] for entry in found]
    assert texts == [[part if isinstance(part, str) else None for part in hit.sequence + hit.answer] for hit in wanted]


def test_images_of_entries_are_sent_if_they_are_asked_for(server):
    query = as_content(questions()[2])
    (entry,) = post(server, "/search", query=query, k=1)["data"]
    assert entry["content"] == [{"type": "image_url", "image_url": None}, text_part("what is it")]
    (entry,) = post(server, "/search", query=query, k=1, include_images=True)["data"]
    kind, _, data = entry["content"][0]["image_url"]["url"].partition(";base64,")
    assert kind == "data:image/png"
    assert Image.open(BytesIO(base64.b64decode(data))).tobytes() == IMAGES[1].tobytes()


@pytest.mark.parametrize("use_images", [False, True])
def test_answers_are_those_of_answer_with_retrieval(server, pair, index, use_images):
    for question in questions():
        settings = {"k": 2, "use_images": use_images, "where": "lang = 'de'"}
        answer = post(server, "/answer", question=as_content(question), **settings, max_tokens=8, temperature=0)
        (wanted,) = answer_with_retrieval(*pair, index, [question], **settings, max_new_tokens=8, do_sample=False)
        assert answer["text"] == wanted.text
        assert [entry["id"] for entry in answer["entries"]] == [hit.id for hit in wanted.hits]
        assert answer["usage"]["completion_tokens"] <= 8


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/search", {"query": "a", "where": "colour = 'red'"}, "colour"),
        ("/search", {"query": "a", "k": 0}, "`k`"),
        ("/search", {"query": ""}, "`query` holds an empty text"),
        ("/search", {"query": "a", "offset": -1}, "`offset`"),
        ("/answer", {"question": []}, "`question`"),
        ("/answer", {"question": "a", "max_tokens": 5000}, "`max_tokens=5000` is more than this server's"),
        ("/answer", {"question": "a", "stream": True}, "`stream` is not known here"),
    ],
)
def test_what_cannot_be_found_is_refused(server, path, body, message):
    with pytest.raises(openai.BadRequestError, match=message):
        post(server, path, **body)


def test_pictures_that_the_index_lacks_cannot_be_used(pair, tmp_path):
    rows = knowledge()
    bare = build_index(*pair, rows, tmp_path / "i", model_name="m", show_progress=False, store_images=False)
    with serving(*pair, bare) as running, pytest.raises(openai.BadRequestError, match="without pictures"):
        post(running, "/answer", question="a", use_images=True)


def test_without_an_index_there_is_no_search(pair):
    with serving(*pair) as running:
        for path in ("/search", "/answer"):
            with pytest.raises(openai.NotFoundError, match=f"Not Found: POST /v1{path}"):
                post(running, path, query="a")

"""The page without a browser: its actions, which ask as clients do, and what stands before it."""

import asyncio
import base64
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from gradio.utils import get_upload_folder
from PIL import Image

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.cli.main import main
from hf_unigd.retrieval import build_index
from hf_unigd.serving.page.actions import Actions
from hf_unigd.serving.page.client import PageClient
from index_cases import IMAGES, knowledge
from serving_cases import eventually, serving
from tiny_models import make_vlm


@pytest.fixture(scope="module")
def pair():
    tiny = make_vlm()
    return UniGDForConditionalGeneration.from_vlm(tiny.model), UniGDProcessor(tiny.processor)


@pytest.fixture(scope="module")
def index(pair, tmp_path_factory):
    rows = knowledge()
    rows = rows.add_item({"images": [], "messages": [{"role": "user", "content": "<b>bold</b> & ${1 + 1}"}]})
    return build_index(*pair, rows, tmp_path_factory.mktemp("i") / "index", model_name="m", show_progress=False)


@pytest.fixture(scope="module")
def server(pair, index):
    with serving(*pair, index, page=True) as running:
        yield running


def act(running, name, *args):
    """What an action shows."""

    async def run():
        actions = Actions(PageClient(running.server.config.app, running.api_key))
        return await getattr(actions, name)(*args)

    return asyncio.run(run())


def typed(text="", *files):
    return {"text": text, "files": [str(file) for file in files]}


def told(shown):
    return re.fullmatch('<p class="unigd-problem" role="alert">(.*)</p>', shown).group(1)


def ids_in(shown):
    return re.findall("<small>(.*?)</small>", shown)


@pytest.fixture
def picture(tmp_path):
    IMAGES[1].save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_a_search_shows_what_the_api_finds_with_scores_and_pictures(server, pair, index, picture):
    shown = act(server, "search", typed("what is it", picture), 6)
    (wanted,) = index.search(*pair, [[IMAGES[1], "what is it"]], k=6)
    assert ids_in(shown) == [hit.id for hit in wanted]
    assert ids_in(shown)[0] == "rows/2"
    assert re.findall('unigd-score">(.*?)</span>', shown) == [f"{hit.score:.3f}" for hit in wanted]
    assert len(re.findall('src="data:image/jpeg;base64,[^"]+"', shown)) == 4
    assert ids_in(act(server, "search", typed("", picture), 2.0)) != []


def test_texts_are_shown_as_texts(server):
    shown = act(server, "search", typed("<b>bold</b> & ${1 + 1}"), 1)
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; ${1 + 1}" in shown


def test_an_answer_names_the_entries_that_were_used(server):
    shown = act(server, "ask", typed("two blue dogs"), 2)
    assert 'class="unigd-answer"' in shown and ids_in(shown)[0] == "rows/4"


def test_an_alignment_is_a_picture_and_tokens_are_bars(server, picture):
    shown = act(server, "align", typed("a cat. a dog.", picture), typed("two dogs"))
    data = re.search('src="data:image/png;base64,([^"]+)"', shown).group(1)
    assert base64.b64decode(data).startswith(b"\x89PNG")
    assert act(server, "look", typed("a cat")).count("<tr>") == 10


def test_what_changed_is_shown_beside_what_is(pair):
    tiny = make_vlm(seed=1)
    other = UniGDForConditionalGeneration.from_vlm(tiny.model).eval(), UniGDProcessor(tiny.processor)
    with serving(*pair, page=True, before=other) as running:
        now, before = act(running, "look", typed("a cat")).split("Before it was trained:")
        assert now.count("<tr>") == before.count("<tr>") == 10


@pytest.mark.parametrize("action", ["search", "ask"])
@pytest.mark.parametrize("nothing", [None, typed(), typed(" \n")])
def test_an_empty_query_is_told_what_to_do(server, action, nothing):
    assert told(act(server, action, nothing, 3)).startswith("Nothing to look for yet: type a text")


def test_what_is_no_picture_or_too_large_is_told(server, tmp_path):
    (tmp_path / "no.png").write_text("no picture")
    Image.new("1", (10_000, 6_000)).save(tmp_path / "huge.png")
    shown = told(act(server, "search", typed("a cat", tmp_path / "no.png"), 3))
    assert shown == "`query` has a corrupt image: cannot identify the format."
    shown = told(act(server, "look", typed("", tmp_path / "huge.png")))
    assert "10000 x 6000 pixels" in shown


def test_it_has_the_limits_of_other_clients(pair, index):
    with serving(*pair, index, page=True, max_requests=1) as running, ThreadPoolExecutor() as pool:
        with running.engine._turns.turn("test"):
            first = pool.submit(act, running, "search", typed("a cat"), 3)
            eventually(lambda: "hf_unigd_requests_in_work 1.0" in httpx.get(f"{running.address}/metrics").text)
            assert "1 requests are in work" in told(act(running, "search", typed("a dog"), 3))
        assert len(ids_in(first.result())) == 3
        assert 'path="/v1/search",status="200"} 1.0' in httpx.get(f"{running.address}/metrics").text


def test_a_failure_is_not_told(server, pair, monkeypatch, caplog):
    def fail(**kwargs):
        raise RuntimeError("of the kitchen")

    monkeypatch.setattr(pair[0], "embed_and_predict", fail)
    assert told(act(server, "look", typed("a cat"))) == "The server failed to answer. Its log says why."
    assert "of the kitchen" in caplog.text


def test_it_stands_at_the_root_behind_the_api(server):
    page = httpx.get(server.address)
    assert page.status_code == 200 and "tiny · hf-unigd" in page.text
    assert httpx.get(f"{server.address}/health").json() == {"status": "ok"}
    assert httpx.get(server.address, headers={"Host": "evil.example"}).status_code == 403


def test_there_is_none_unless_it_is_asked_for(pair):
    with serving(*pair) as running:
        assert httpx.get(running.address).status_code == 404


def test_without_an_index_it_says_what_is_missing(pair):
    with serving(*pair, page=True) as running:
        config = httpx.get(f"{running.address}/config").text
        assert config.count("This server has no index") == 2
        assert act(running, "look", typed("a cat")).count("<tr>") == 10


def test_browsers_send_the_key_as_a_password(pair):
    with serving(*pair, page=True, api_key="secret") as running:
        asked = httpx.get(running.address)
        assert asked.status_code == 401 and asked.headers["WWW-Authenticate"].startswith("Basic realm=")
        for password, status in {"secret": 200, "secrets": 401, "": 401}.items():
            assert httpx.get(running.address, auth=("anybody", password)).status_code == status
        for header in ("Basic", "Basic ?", "Basic c2VjcmV0", "secret", "Digest secret"):
            assert httpx.get(running.address, headers={"Authorization": header}).status_code == 401
        assert act(running, "look", typed("a cat")).count("<tr>") == 10


@pytest.mark.parametrize("path", ["heartbeat/abc", "queue/data?session_hash=abc"])
def test_a_stream_to_a_page_does_not_keep_the_server_from_ending(pair, path):
    with serving(*pair, page=True) as running:
        stream = httpx.stream("GET", f"{running.address}/gradio_api/{path}")
        stream.__enter__()
        begin = time.monotonic()
    assert time.monotonic() - begin < 10


def test_nobody_reaches_a_file_of_the_server_or_another_address_by_it(server, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    path = tmp_path / "secret.txt"
    assert httpx.get(f"{server.address}/gradio_api/file={path}").status_code in (403, 404)
    page = httpx.get(f"{server.address}/config").json()
    search = next(each for each in page["dependencies"] if len(each["inputs"]) == 2)
    for file in (str(path), "http://127.0.0.1:1/a.png", f"{get_upload_folder()}/../{path}"):
        body = {
            "data": [{"text": "", "files": [{"path": file, "meta": {"_type": "gradio.FileData"}}]}, 3],
            "fn_index": search["id"],
            "session_hash": "abc",
        }
        httpx.post(f"{server.address}/gradio_api/queue/join", json=body)
        events = httpx.get(f"{server.address}/gradio_api/queue/data?session_hash=abc").text
        assert "Only files that were uploaded are taken." in events and '"success":false' in events


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match="`--page` needs gradio: `pip install 'hf-unigd\\[app\\]'`"):
        main(["serve", "--model", "nothing", "--page", "true"])

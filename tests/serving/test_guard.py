"""Keys, limits, clients that go away, failures, metrics, and the end of a server."""

import json
import signal
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from serving_cases import NAME, eventually, in_threads, send, serving
from tiny_models import make_vlm


@pytest.fixture(scope="module")
def pair():
    tiny = make_vlm()
    return UniGDForConditionalGeneration.from_vlm(tiny.model), UniGDProcessor(tiny.processor)


def embed(client, text="a red cat", **kwargs):
    return client.embeddings.create(model=NAME, input=text, **kwargs)


def chat(client, **kwargs):
    return client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "a red cat"}], **kwargs)


def value(running, name, **labels):
    """A metric."""
    families = text_string_to_metric_families(httpx.get(f"{running.address}/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == f"hf_unigd_{name}"]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def test_the_key_is_asked_for_everywhere_but_at_health(pair):
    with serving(*pair, api_key="secret") as running:
        assert len(embed(running.client()).data) == 1
        assert [model.id for model in running.client().models.list()] == [NAME]
        for key in ("none", "Secret", "secrets"):
            with pytest.raises(openai.AuthenticationError, match="missing or wrong") as refused:
                embed(running.client(api_key=key))
            assert refused.value.code == "invalid_api_key"
        for path, status in {"/health": 200, "/metrics": 401, "/v1/models": 401, "/openapi.json": 401}.items():
            assert httpx.get(running.address + path).status_code == status


def test_without_a_key_a_page_cannot_reach_it_by_a_name_of_its_own(pair):
    hosts = {"localhost": 200, "127.0.0.1:1": 200, "127.0.1.1": 200, "[::1]:80": 200, "evil.example": 403, "": 403}
    hosts |= {"127.0.0.1.evil.example": 403, "evil.example:80": 403, "localhost.evil:80": 403, "8.8.8.8": 403}
    with serving(*pair) as running:
        for host, status in hosts.items():
            assert httpx.get(f"{running.address}/v1/models", headers={"Host": host}).status_code == status
    allowed = {"a.example": 200, "A.Example:443": 200, "b.example": 200, "b.a.example": 403, "example": 403}
    with serving(*pair, allowed_hosts=["a.example", "B.example"]) as running:
        for host, status in {**hosts, **allowed}.items():
            assert httpx.get(f"{running.address}/v1/models", headers={"Host": host}).status_code == status
    with serving(*pair, api_key="secret") as running:
        headers = {"Host": "model.example", "Authorization": "Bearer secret"}
        assert httpx.get(f"{running.address}/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_body_that_is_too_large_is_not_read(pair, stream):
    body = json.dumps({"input": "a" * 2000}).encode()
    with serving(*pair, max_body_mb=0.001) as running:
        content = iter([body[:900], body[900:]]) if stream else body
        answer = httpx.post(f"{running.address}/v1/embeddings", content=content)
        assert answer.status_code == 413 and "`--max_body_mb`" in answer.json()["error"]["message"]
        assert len(embed(running.client()).data) == 1


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "message"),
    [
        ("GET", "/v1/nothing", None, 404, "Not Found: GET /v1/nothing"),
        ("GET", "/v1/embeddings", None, 405, "Method Not Allowed: GET /v1/embeddings"),
        ("POST", "/v1/embeddings", "{", 400, "JSON"),
        ("POST", "/v1/embeddings", "[]", 400, ""),
        ("POST", "/v1/embeddings", "", 400, ""),
        ("POST", "/v1/embeddings", '"\ud800"'.encode("utf-8", "surrogatepass"), 400, ""),
    ],
)
def test_every_error_has_openais_form(pair, method, path, content, status, message):
    with serving(*pair) as running:
        headers = {"Content-Type": "application/json"}
        answer = httpx.request(method, running.address + path, content=content, headers=headers)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("ask", [embed, chat])
def test_a_failure_is_logged_and_not_told(pair, ask, monkeypatch, caplog):
    model, _ = pair
    with serving(*pair) as running:

        def fail(**kwargs):
            raise RuntimeError("of the kitchen")

        monkeypatch.setattr(model, "embed", fail)
        monkeypatch.setattr(model, "generate", fail)
        with pytest.raises(openai.InternalServerError, match="Its log says why") as told:
            ask(running.client())
        assert "kitchen" not in str(told.value.body)
        assert "of the kitchen" in caplog.text
        monkeypatch.undo()
        assert ask(running.client())


def test_more_requests_than_allowed_are_told_to_come_again(pair):
    with serving(*pair, max_requests=2) as running, ThreadPoolExecutor() as pool:
        with running.engine._turns.turn("test"):
            answers = [pool.submit(embed, running.client()) for _ in range(2)]
            eventually(lambda: value(running, "requests_in_work") == 2)
            with pytest.raises(openai.RateLimitError, match="2 requests are in work") as refused:
                embed(running.client())
            assert refused.value.response.headers["Retry-After"] == "1"
            assert httpx.get(f"{running.address}/health").status_code == 200
        assert all(answer.result().data for answer in answers)
        # The client's own retries are enough.
        answers = in_threads([lambda: embed(running.client(max_retries=8), ["a"] * 20)] * 6)
        assert all(len(answer.data) == 20 for answer in answers)


def body_of(stream=False, **kwargs):
    messages = [{"role": "user", "content": "a red cat"}]
    return json.dumps({"messages": messages, "stream": stream, "temperature": 0, **kwargs}).encode()


def test_a_client_that_goes_away_frees_its_place(pair):
    with serving(*pair, max_requests=1) as running:
        for path, body in [
            ("/v1/embeddings", b'{"input": "a"}'),
            ("/v1/chat/completions", body_of()),
            ("/v1/chat/completions", body_of(stream=True)),
        ]:
            with running.engine._turns.turn("test"):
                connection = send(running.address, path, body)
                eventually(lambda: value(running, "requests_in_work") == 1)
                connection.close()
                eventually(lambda: value(running, "requests_in_work") == 0)
        assert value(running, "requests_total", status="499") == 3
        assert len(embed(running.client()).data) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_nobody_waits_for_is_not_finished(pair, stream):
    model, _ = pair
    steps = []
    hook = model.vlm.register_forward_hook(lambda *args: steps.append(1))
    try:
        with serving(*pair) as running:
            steps.clear()
            connection = send(running.address, "/v1/chat/completions", body_of(stream, max_tokens=1000))
            eventually(lambda: len(steps) > 3)
            connection.close()
            eventually(lambda: value(running, "requests_in_work") == 0)
            chat(running.client(), max_tokens=1)
            eventually(lambda: running.engine._turns._holder is None)
            assert len(steps) < 900
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("long", "short"),
    [
        (lambda client: chat(client, max_tokens=1000, temperature=0), embed),
        (lambda client: chat(client, max_tokens=1000, temperature=0), lambda client: chat(client, max_tokens=1)),
        (lambda client: embed(client, ["three people waving"] * 2000), lambda client: chat(client, max_tokens=1)),
        (lambda client: embed(client, ["three people waving"] * 2000), embed),
    ],
)
def test_what_is_short_does_not_wait_for_what_is_long(pair, long, short):
    with serving(*pair) as running, ThreadPoolExecutor() as pool:
        answer = pool.submit(long, running.client())
        eventually(lambda: value(running, "batch_size_count") >= 1)
        assert short(running.client())
        assert value(running, "requests_in_work") == 1
        assert not answer.done()
        assert answer.result()


def test_metrics_count_requests_batches_and_tokens(pair):
    with serving(*pair, batch_window_ms=300) as running:
        in_threads([lambda: embed(running.client(), ["a", "b"])] * 2)
        answer = chat(running.client(), max_tokens=4)
        with pytest.raises(openai.BadRequestError):
            embed(running.client(), "")
        assert value(running, "requests_total", path="/v1/embeddings", status="200") == 2
        assert value(running, "requests_total", path="/v1/embeddings", status="400") == 1
        assert value(running, "request_seconds_count", path="/v1/chat/completions") == 1
        assert value(running, "batch_size_sum", kind="embedding") == 4
        assert value(running, "batch_size_count", kind="embedding") == 1  # of both requests
        assert value(running, "tokens_total", kind="generated") == answer.usage.completion_tokens
        assert value(running, "tokens_total", kind="prompt") == answer.usage.prompt_tokens
        assert value(running, "waiting_jobs") == 0


def test_the_end_finishes_what_runs_and_refuses_what_waits(pair):
    """Two threads embed, each a batch of one; the third request waits."""
    with serving(*pair, batch_size=1) as running, ThreadPoolExecutor() as pool:
        with running.engine._turns.turn("test"):
            running_ones = [pool.submit(embed, running.client()) for _ in range(2)]
            eventually(lambda: value(running, "batch_size_count", kind="embedding") == 2)
            waiting = pool.submit(embed, running.client())
            eventually(lambda: value(running, "waiting_jobs", kind="embedding") == 1)
            running.server.handle_exit(signal.SIGTERM, None)
            with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
                waiting.result()
            assert refused.value.status_code == 503
        assert all(len(each.result().data) == 1 for each in running_ones)
        eventually(lambda: not is_listening(running.address))


def is_listening(address):
    try:
        urllib.request.urlopen(f"{address}/health")
    except HTTPError:
        return True
    except OSError:
        return False
    return True

"""Whether a server's vectors are a checkpoint's: our server, and one that does what servers get wrong."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.cli.main import main
from hf_unigd.hub.doctor_endpoint import examine_endpoint
from hf_unigd.hub.findings import FAULT, NOTE, OK
from serving_cases import serving
from tiny_models import make_vlm


@pytest.fixture(scope="module")
def pair():
    tiny = make_vlm("llava")
    torch.manual_seed(0)
    model = UniGDForConditionalGeneration.from_vlm(tiny.model, head_type="mlp", embedding_dim=8, matryoshka_dims=[4])
    return model, UniGDProcessor(tiny.processor, instructions={"query": "Find the picture."})


@pytest.fixture(scope="module")
def checkpoint(pair, tmp_path_factory):
    model, model.processor = pair
    folder = tmp_path_factory.mktemp("endpoint") / "model"
    model.save_pretrained(folder)
    return folder


@contextmanager
def answering(answer):
    """A server whose `/v1/embeddings` returns what `answer` makes of a body: a vector, or None to refuse it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._send(200, {"object": "list", "data": [{"id": "served", "object": "model"}]})

        def do_POST(self):
            vector = answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if vector is None:
                self._send(422, {"error": {"message": "no such input here"}})
            else:
                self._send(200, {"object": "list", "data": [{"index": 0, "embedding": vector}], "model": "served"})

        def _send(self, status, content):
            content = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def of_texts(pair, change=lambda vector: vector, **kwargs):
    """Answers texts alone, as servers of text models do."""
    model, processor = pair

    def answer(body):
        assert body["model"] == "served"
        if not isinstance(body.get("input"), str) or "prompt_name" in body:
            return None
        with torch.no_grad():
            return change(model.embed(**processor.process_sequences([body["input"]], **kwargs))[0]).tolist()

    return answer


def levels(findings):
    return [(finding.subject, finding.level) for finding in findings]


def test_our_server_gives_the_vectors_of_the_model(pair, checkpoint, capsys):
    with serving(*pair) as running:
        main(["doctor", str(checkpoint), "--url", f"{running.address}/v1"])
    page = capsys.readouterr().out
    assert "No faults." in page
    for subject in ("text", "image and text", "image", "query"):
        assert f"ok    {subject:<16}the model's vector by `input" in page
        assert f"ok    {subject:<16}the model's vector by `messages`" in page or subject == "query"


def test_a_server_of_texts_is_not_asked_for_images(pair, checkpoint):
    with answering(of_texts(pair)) as url:
        findings = examine_endpoint(checkpoint, url)
    assert levels(findings) == [("text", OK), ("image and text", NOTE), ("image", NOTE), ("query", NOTE)]
    assert "refused: Error code: 422" in findings[1].text and "no such input here" in findings[1].text


@pytest.mark.parametrize(
    ("change", "level", "text"),
    [
        (
            lambda vector: vector.bfloat16().float(),
            NOTE,
            "the model's vector, if the server computes in 16 bits, by `input`",
        ),
        (lambda vector: vector * 3, NOTE, "the model's vector by `input`: of length 3 instead of 1, otherwise off by"),
        (lambda vector: torch.nn.functional.normalize(vector[:4], dim=0), NOTE, "the first 4 of 8 numbers, off by"),
        (lambda vector: vector.repeat(4), FAULT, "another vector by `input`: 32 numbers instead of 8"),
        (lambda vector: vector.flip(0), FAULT, "another vector by `input`: off by"),
        (lambda vector: vector * torch.nan, FAULT, "off by inf"),
    ],
)
def test_what_is_wrong_with_a_vector_is_said(pair, checkpoint, change, level, text):
    with answering(of_texts(pair, change)) as url:
        finding = examine_endpoint(checkpoint, url)[0]
    assert (finding.level, text in finding.text) == (level, True), finding


def test_a_server_without_the_prompt_is_found_out(pair, checkpoint, capsys):
    """It embeds the text at its last token, as servers do without a template."""
    model, processor = pair

    def answer(body):
        if not isinstance(body.get("input"), str):
            return None
        ids = processor.tokenizer([body["input"]], return_tensors="pt")
        with torch.no_grad():
            return model.embed(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])[0].tolist()

    with answering(answer) as url, pytest.raises(SystemExit) as end:
        main(["doctor", str(checkpoint), "--url", url])
    assert end.value.code == 1
    assert "FAULT text" in capsys.readouterr().out


def test_the_form_that_gives_the_vectors_is_named(pair, checkpoint):
    """As vLLM: `input` gets no prompt, and chats get their first token when asked for it."""
    model, processor = pair

    def answer(body):
        if "messages" not in body:
            return [1.0] + [0.0] * 7
        if any(part["type"] != "text" for turn in body["messages"] for part in turn["content"]):
            return None
        batch = processor.process_sequences([body["messages"]])
        if not body.get("add_special_tokens"):
            batch = {"input_ids": batch["input_ids"][:, 1:], "attention_mask": batch["attention_mask"][:, 1:]}
        with torch.no_grad():
            return model.embed(**batch)[0].tolist()

    def without_instructions(body):
        return None if len(body.get("messages", [])) > 1 or "prompt_name" in body else answer(body)

    with answering(without_instructions) as url:
        findings = [finding for finding in examine_endpoint(checkpoint, url) if finding.subject == "text"]
    assert [finding.level for finding in findings] == [NOTE, NOTE, OK]
    assert all("Send `messages with add_special_tokens`" in finding.text for finding in findings[:2])


def test_what_cannot_be_examined_is_an_error(checkpoint, tmp_path):
    with pytest.raises(SystemExit, match=r"`--url http://127.0.0.1:9/v1`: .*Connection error"):
        main(["doctor", str(checkpoint), "--url", "http://127.0.0.1:9/v1"])
    with pytest.raises(SystemExit, match=r"give its `--url`"):
        main(["doctor", str(checkpoint), "--name", "served"])
    make_vlm("llava").model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=r"has no probe\.safetensors"):
        main(["doctor", str(tmp_path), "--url", "http://127.0.0.1:9/v1"])


def test_a_server_that_refuses_everything_is_a_fault(checkpoint):
    with answering(lambda body: None) as url:
        findings = examine_endpoint(checkpoint, url)
    assert levels(findings)[-1] == ("endpoint", FAULT)

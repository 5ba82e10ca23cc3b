"""`hf-unigd serve`, as a process of its own."""

import signal
import socket
import sys

import httpx
import openai
import pytest

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.cli.main import main
from hf_unigd.retrieval import build_index
from index_cases import knowledge
from serving_cases import started_process
from tiny_models import make_vlm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and an index of it."""
    folder = tmp_path_factory.mktemp("serve")
    tiny = make_vlm()
    model, processor = UniGDForConditionalGeneration.from_vlm(tiny.model), UniGDProcessor(tiny.processor)
    model.processor = processor
    model.save_pretrained(folder / "model")
    build_index(model, processor, knowledge(), folder / "index", model_name="m", show_progress=False)
    return folder


def started(*arguments):
    return started_process([sys.executable, "-m", "hf_unigd", "serve", "--port", "0", *map(str, arguments)])


def test_it_answers_until_it_is_told_to_end_and_finishes_its_answer(folder):
    arguments = ("--model", folder / "model", "--index", folder / "index", "--name", "ours", "--api_key", "secret")
    with started(*arguments) as (process, address, lines):
        assert f"and a page at {address}/" in "".join(lines)
        assert httpx.get(address, auth=("anybody", "secret")).status_code == 200
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
        assert len(client.embeddings.create(model="ours", input="a red cat").data[0].embedding) == 32
        found = client.post("/search", body={"query": "a red cat", "k": 2}, cast_to=object)
        assert len(found["data"]) == 2
        messages = [{"role": "user", "content": "a red cat"}]
        usage = {"include_usage": True}
        stream = client.chat.completions.create(
            model="ours", messages=messages, max_tokens=900, temperature=0, stream=True, stream_options=usage
        )
        next(stream)
        process.send_signal(signal.SIGTERM)
        *_, last = stream
        assert last.usage.completion_tokens == 900
        process.wait(60)
        assert process.returncode in (0, -signal.SIGTERM)
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
    assert "Traceback" not in "".join(lines)
    assert "secret" not in "".join(lines)


def refused(*arguments):
    with pytest.raises(SystemExit) as end:
        main(["serve", *map(str, arguments)])
    return str(end.value)


def test_a_port_in_use_is_refused_before_the_model_is_loaded(folder):
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        message = refused("--model", "nothing", "--port", port)
    assert f"cannot listen at `--host 127.0.0.1 --port {port}`: Address already in use." in message


def test_other_machines_need_a_key(folder):
    message = refused("--model", "nothing", "--host", "0.0.0.0", "--port", 0)
    assert message.startswith("hf-unigd serve: `--host 0.0.0.0` lets other machines in. Give `--api_key KEY`")
    assert "`--api_key` is empty" in refused("--model", "nothing", "--api_key", " ")


@pytest.mark.parametrize("host", ["", "https://model.example", "model.example:80", "*", "*.example", "model example"])
def test_an_allowed_host_is_a_name(folder, host):
    assert f"`--allowed_hosts {host}` is no name" in refused("--model", "nothing", "--allowed_hosts", host)


def test_a_key_and_allowed_hosts_exclude_each_other(folder):
    message = refused("--model", "nothing", "--api_key", "secret", "--allowed_hosts", "model.example")
    assert "not both" in message


def test_what_is_not_installed_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("hf_unigd.serving.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    message = refused("--model", "nothing")
    assert message == "hf-unigd serve: `hf-unigd serve` needs fastapi: `pip install 'hf-unigd[serve]'`."


def test_an_index_of_another_model_is_refused(folder, tmp_path):
    tiny = make_vlm(seed=1)
    model = UniGDForConditionalGeneration.from_vlm(tiny.model)
    model.processor = UniGDProcessor(tiny.processor)
    model.save_pretrained(tmp_path / "other")
    message = refused("--model", tmp_path / "other", "--index", folder / "index", "--port", 0)
    assert f"{tmp_path}/other embeds its probe" in message


@pytest.mark.parametrize(
    "setting", [("--batch_size", 0), ("--max_body_mb", 0), ("--port", -1), ("--batch_window_ms", -1)]
)
def test_settings_out_of_range_are_refused(setting):
    assert f"`{setting[0][2:]}={setting[1]}" in refused("--model", "nothing", *setting)

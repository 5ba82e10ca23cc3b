"""Measures `hf-unigd serve` under load: `python benchmarks/serving.py [--clients 1 8 64] [--seconds 30]`.

The model is that of benchmarks/training.py, with random weights. The server is a process of its own; its clients are
coroutines of this one, each of which asks again as soon as it is answered. `embedding` and `chat` are that many
clients of one kind, and `mixed` as many of both at once. Inputs differ from client to client, and every answer is
compared with the one that the model gives alone: a vector to 1e-4, a chat by its text. `loop` is the same model called
for one input after another, in this process. `beside` is the p95 of a kind in `mixed` as a multiple of its p95 alone.

`--peer infinity_emb` runs infinity too, by the command of this name, which may be one of another environment. It
serves the language model alone, as a model of sentence-transformers, and gets the texts with the embedding prompt
around them, so that its vectors are the same.

The script writes benchmarks/results/serving.json.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
from training import make_image, make_processor, make_text, make_vlm

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor


RESULTS = Path(__file__).parent / "results" / "serving.json"
NAME, POOL, NEW_TOKENS = "served", 64, 16

# Asks for the input of a number, and returns the vector or text of the answer.
Ask = Callable[[int], Awaitable[Any]]


def sequence(place: int, kind: str) -> list[Any]:
    """The input of a number: a text, an image, or both."""
    text, image = make_text(4 + place * 7 % 40, place), make_image(place)
    return [[text], [text], [image], [image, text]][place % 4] if kind != "text" else [text]


def as_parts(parts: list[Any]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": part} if isinstance(part, str) else image_part(part) for part in parts]


def image_part(image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def save_language_model(model: UniGDForConditionalGeneration, processor: UniGDProcessor, folder: Path) -> None:
    """The language model as one of sentence-transformers, in the files of its older releases."""
    model.vlm.model.language_model.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    tokens = {name: value for name, value in json.loads(config.read_text()).items() if name.endswith("_token")}
    settings = {**tokens, "tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(settings))
    modules = ("Transformer", "1_Pooling"), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")
    kinds = [
        {
            "idx": place,
            "name": str(place),
            "path": path if place else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for place, (kind, path) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(kinds))
    (folder / "1_Pooling").mkdir()
    pooling = {
        "word_embedding_dimension": model.config.embedding_dim,
        "pooling_mode_lasttoken": True,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_cls_token": False,
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 1024}))


def with_prompt(processor: UniGDProcessor, text: str) -> str:
    """A text with what the model is asked around it."""
    turn = {"role": "user", "content": [{"type": "text", "text": f"{text}\n{processor.prompts['text']}"}]}
    return processor.apply_chat_template([turn], add_generation_prompt=True)


def in_a_loop(model, processor) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """What the model answers to each input alone, and how long that takes."""

    def embed(place):
        return model.embed(**processor.process_sequences([sequence(place, "any")]))[0].numpy()

    def chat(place):
        batch = processor.process_sequences([sequence(place, "any")], prompted=False, padding_side="left")
        tokens = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)[0, batch["input_ids"].shape[1] :]
        return processor.decode(tokens, skip_special_tokens=True)

    answers, found = {}, {}
    with torch.inference_mode():
        for kind, ask in {"embedding": embed, "chat": chat}.items():
            ask(0)
            seconds, answers[kind] = [], []
            for place in range(POOL):
                start = time.perf_counter()
                answers[kind].append(ask(place))
                seconds.append(time.perf_counter() - start)
            found[kind] = summary(seconds, sum(seconds), 0)
    return answers, found


def summary(seconds: list[float], whole: float, wrong: int) -> dict[str, Any]:
    p50, p95 = (1000 * float(np.quantile(seconds, share)) for share in (0.5, 0.95))
    return {"requests": len(seconds), "per_second": len(seconds) / whole, "p50_ms": p50, "p95_ms": p95, "wrong": wrong}


def ours(folder: Path) -> list[str]:
    return [sys.executable, "-m", "hf_unigd", "serve", "--model", str(folder), "--name", NAME, "--port", "0"]


def infinity(command: str, folder: Path) -> list[str]:
    names = ["--model-id", str(folder), "--served-model-name", NAME, "--url-prefix", "/v1", "--port", "7997"]
    return [
        command,
        "v2",
        *names,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--batch-size",
        "32",
        "--no-bettertransformer",
    ]


@contextmanager
def serving(words: list[str], address: str) -> Iterator[str]:
    """A server, once it has printed its address, which a pattern of one group finds."""
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
        try:
            while (found := re.search(address, Path(log.name).read_text())) is None:
                assert process.poll() is None, Path(log.name).read_text()
                time.sleep(0.1)
            yield f"{found[1]}/v1"
        finally:
            process.terminate()
            process.wait()


def asking(session: aiohttp.ClientSession, url: str, texts: list[str]) -> dict[str, Ask]:
    """How to ask a server. `texts` are what it gets for texts."""
    bodies = [as_parts(sequence(place, "any")) for place in range(POOL)]

    async def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with session.post(f"{url}/{path}", json={"model": NAME, **body}) as response:
            response.raise_for_status()
            return await response.json()

    def vector(answer: dict[str, Any]) -> np.ndarray:
        return np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")

    async def embed(place: int) -> np.ndarray:
        body = {"input": [{"content": bodies[place]}], "encoding_format": "base64"}
        return vector(await post("embeddings", body))

    async def embed_text(place: int) -> np.ndarray:
        answer = await post("embeddings", {"input": [texts[place]]})
        return np.array(answer["data"][0]["embedding"])

    async def chat(place: int) -> str:
        messages = [{"role": "user", "content": bodies[place]}]
        answer = await post("chat/completions", {"messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0})
        return answer["choices"][0]["message"]["content"]

    return {"embedding": embed, "chat": chat, "text": embed_text}


def is_right(answer: Any, wanted: Any) -> bool:
    return answer == wanted if isinstance(wanted, str) else bool(np.abs(answer - wanted).max() < 1e-4)


async def load(clients: dict[str, int], ask: dict[str, Ask], wanted: dict[str, list[Any]], seconds: float) -> dict:
    """Clients of each kind that ask for so long. A request that fails is an error."""
    start = time.perf_counter()
    taken: dict[str, list[float]] = {kind: [] for kind in clients}
    wrong = dict.fromkeys(clients, 0)

    async def client(kind: str, number: int) -> None:
        place = number
        while time.perf_counter() - start < seconds:
            begun = time.perf_counter()
            answer = await ask[kind](place % POOL)
            taken[kind].append(time.perf_counter() - begun)
            wrong[kind] += not is_right(answer, wanted[kind][place % POOL])
            place += 7

    await asyncio.gather(*(client(kind, number) for kind, count in clients.items() for number in range(count)))
    whole = time.perf_counter() - start
    return {kind: summary(taken[kind], whole, wrong[kind]) for kind in clients}


async def measure(url: str, wanted: dict[str, list[Any]], texts: list[str], arguments) -> dict[str, Any]:
    found: dict[str, Any] = {}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        ask = asking(session, url, texts)
        for count in arguments.clients:
            each = {kind: await load({kind: count}, ask, wanted, arguments.seconds) for kind in ("embedding", "chat")}
            mixed = await load({"embedding": count, "chat": count}, ask, wanted, arguments.seconds)
            alone = {kind: each[kind][kind] for kind in each}
            beside = {kind: mixed[kind]["p95_ms"] / alone[kind]["p95_ms"] for kind in mixed}
            found[f"{count} clients"] = {**alone, "mixed": mixed, "beside": beside}
            print(count, json.dumps(found[f"{count} clients"], indent=1), flush=True)
    return found


async def compare(
    servers: dict[str, tuple[str, list[str]]], wanted: dict[str, list[Any]], arguments
) -> dict[str, Any]:
    """Embeddings of texts from each server, in turns."""
    found: dict[str, Any] = {name: {} for name in servers}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for count in arguments.clients:
            for name, (url, texts) in servers.items():
                ask = asking(session, url, texts)
                found[name] |= {f"{count} clients": await load({"text": count}, ask, wanted, arguments.seconds)}
            print("texts", count, json.dumps(found, indent=1), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=30, help="Of each load.")
    parser.add_argument("--peer", help="The command of infinity.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        processor = make_processor()
        model = UniGDForConditionalGeneration.from_vlm(make_vlm(processor)).eval()
        model.processor = UniGDProcessor(processor)
        model.save_pretrained(folder)
        wanted, loop = in_a_loop(model, model.processor)
        found = {
            "clients": arguments.clients,
            "seconds": arguments.seconds,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_before": os.getloadavg()[0],
            "processor": platform.processor() or platform.machine(),
            **{name: version(name) for name in ("torch", "transformers", "fastapi", "uvicorn")},
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "new_tokens": NEW_TOKENS,
            "loop": loop,
        }
        with serving(ours(folder), r"at (http\S+)/v1") as url:
            texts = [sequence(place, "text")[0] for place in range(POOL)]
            found |= asyncio.run(measure(url, wanted, texts, arguments))
            if arguments.peer:
                save_language_model(model, model.processor, Path(temporary) / "text")
                with torch.inference_mode():
                    alone = [model.embed(**model.processor.process_sequences([text]))[0].numpy() for text in texts]
                rendered = [with_prompt(model.processor, text) for text in texts]
                words = infinity(arguments.peer, Path(temporary) / "text")
                with serving(words, r"running on (http\S+)") as peer:
                    servers = {"ours": (url, texts), "infinity": (peer, rendered)}
                    found["texts"] = asyncio.run(compare(servers, {"text": alone}, arguments))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(f"Written to {RESULTS}")


if __name__ == "__main__":
    main()

"""Examines a server: whether the vectors that it gives are those of a checkpoint."""

import base64
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F
from transformers.utils import PROCESSOR_NAME

from ..modeling.hub_files_unigd import find_file, read_json
from ..modeling.probe_unigd import PROBE_NAME, load_probe, probe_sequences, rounding_tolerance
from .findings import FAULT, NOTE, OK, Finding, line


API_KEY = "OPENAI_API_KEY"
_SECONDS = 120
_COARSE = rounding_tolerance(8)  # of bfloat16, in which a server may run
# Of vLLM: its chats have no token of beginning otherwise, which LLaVA's templates leave to the tokenizer.
_SPECIAL = {"add_special_tokens": True}


@dataclass(frozen=True)
class _Case:
    """
    Attributes:
        subject: What is embedded.
        wanted: `torch.FloatTensor` of shape `(d,)`: what the checkpoint makes of it.
        forms: The requests that may ask for it, by what they are called.
    """

    subject: str
    wanted: torch.Tensor
    forms: dict[str, dict[str, Any]]


def examine_endpoint(
    name: str | Path, url: str, served: str | None = None, revision: str | None = None, token: str | None = None
) -> list[Finding]:
    """
    Sends the inputs of a checkpoint's probe to a server, in each form that servers take, and compares the vectors.

    Args:
        name: A folder or Hub id. Nothing of its weights is read.
        url: Where the server speaks OpenAI's API, such as `http://localhost:8000/v1`. The environment variable
            `OPENAI_API_KEY` holds its key, if it asks for one.
        served: The name of the model there. By default the first that the server lists.
        revision, token: Of a Hub id.

    Returns:
        What was found; [`report`] prints it.

    Raises:
        ImportError: the package `openai` is not installed.
        ValueError: the checkpoint has no probe.
        ConnectionError: the server cannot be reached.
    """
    try:
        import openai
    except ImportError as error:
        raise ImportError("`--url` needs openai: `pip install 'hf-unigd[endpoint]'`.") from error
    where = {"revision": revision, "token": token}
    probe_file, processor_file = (find_file(name, file, where) for file in (PROBE_NAME, PROCESSOR_NAME))
    if probe_file is None or processor_file is None:
        raise ValueError(f"{name} has no {PROBE_NAME} or no {PROCESSOR_NAME}, to compare with. Save it again.")
    probe = load_probe(probe_file)
    client = openai.OpenAI(base_url=url, api_key=os.environ.get(API_KEY) or "none", timeout=_SECONDS)
    findings, has_answered = [], False
    try:
        served = served or client.models.list().data[0].id
        for case in _cases(probe["embeddings"], read_json(processor_file).get("instructions") or {}):
            vectors: dict[str, torch.Tensor] = {}
            refused = ""
            for form, body in case.forms.items():
                try:
                    answer: Any = client.post("/embeddings", body={"model": served, **body}, cast_to=object)
                    vectors[form] = torch.tensor(answer["data"][0]["embedding"], dtype=torch.float32)
                except openai.APIStatusError as error:
                    refused = refused or line(error)
                except (KeyError, IndexError, TypeError, ValueError) as error:
                    refused = refused or f"an answer without a vector: {line(error)}"
            has_answered = has_answered or bool(vectors)
            findings += _compare(case, vectors, refused, rounding_tolerance(int(probe["dtype_width"])))
    except openai.APIError as error:
        raise ConnectionError(f"`--url {url}`: {line(error)} Check the address and {API_KEY}.") from error
    if not has_answered:
        findings.append(Finding("endpoint", FAULT, f"{served} at {url} gives no vector for any input"))
    return findings


def _cases(embeddings: torch.Tensor, instructions: dict[str, str]) -> Iterator[_Case]:
    """The rows of a probe, as [`~hf_unigd.modeling.probe_unigd.make_probe`] orders them."""
    sequences = probe_sequences()
    subjects = ("text", "image and text", "image")
    for subject, sequence, wanted in zip(subjects, sequences, embeddings, strict=False):
        parts = list(map(_part, sequence if isinstance(sequence, list) else [sequence]))
        turn = {"role": "user", "content": parts}
        contents = sequence if isinstance(sequence, str) else [{"content": parts}]
        yield _Case(subject, wanted, {"input": {"input": contents}, **_chats([turn])})
    turn = {"role": "user", "content": [_part(sequences[0])]}
    for (name, text), wanted in zip(sorted(instructions.items()), embeddings[len(sequences) :], strict=False):
        forms = {"input with prompt_name": {"input": sequences[0], "prompt_name": name}}
        yield _Case(name, wanted, {**forms, **_chats([{"role": "system", "content": text}, turn])})


def _chats(messages: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        "messages": {"messages": messages},
        "messages with add_special_tokens": {"messages": messages, **_SPECIAL},
    }


def _part(part: str | Image.Image) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    file = BytesIO()
    part.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _compare(case: _Case, vectors: dict[str, torch.Tensor], refused: str, tolerance: float) -> list[Finding]:
    if not vectors:
        return [Finding(case.subject, NOTE, f"refused: {refused}")]
    compared = {form: _difference(vector, case.wanted) for form, vector in vectors.items()}
    best = min(difference for difference, _ in compared.values())
    # A server that gives one of them exactly does not compute in 16 bits.
    good = [
        form
        for form, (difference, _) in compared.items()
        if difference <= (tolerance if best <= tolerance else _COARSE)
    ]
    findings = []
    for form, (difference, remark) in compared.items():
        text = f"by `{form}`: {remark or 'off by'} {difference:.2g}"
        if form in good:
            is_exact = difference <= tolerance
            rounded = "" if is_exact else ", if the server computes in 16 bits,"
            level = OK if is_exact and not remark else NOTE
            findings.append(Finding(case.subject, level, f"the model's vector{rounded} {text}"))
        elif good:
            findings.append(Finding(case.subject, NOTE, f"another vector {text}. Send `{good[0]}`"))
        else:
            findings.append(
                Finding(
                    case.subject,
                    FAULT,
                    f"another vector {text}. See the server's prompt or chat template, its pooling, the head, and the "
                    "instruction",
                )
            )
    return findings


def _difference(vector: torch.Tensor, wanted: torch.Tensor) -> tuple[float, str]:
    """The relative distance of a vector from the one that is wanted, and what else is to say of it."""
    remark = ""
    if 0 < len(vector) < len(wanted):
        remark, wanted = (
            f"the first {len(vector)} of {len(wanted)} numbers, off by",
            F.normalize(wanted[: len(vector)], dim=0),
        )
    if len(vector) != len(wanted):
        return float("inf"), f"{len(vector)} numbers instead of {len(wanted)}, off by"
    length = vector.norm().item()
    if abs(length - 1) > _COARSE:
        remark, vector = f"of length {length:.3g} instead of 1, otherwise off by", F.normalize(vector, dim=0)
    difference = (vector - wanted).norm() / wanted.norm()
    return difference.nan_to_num(nan=torch.inf).item(), remark

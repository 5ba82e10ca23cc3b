"""Attacks a small checkpoint and an adapter: every file, key and tensor damaged, then examined and loaded.

Right is damage that the doctor reports, or that changes nothing; refused is damage that a load names in an error.
Wrong is all else: an error of the doctor, a load with every check that embeds otherwise, an error without a message,
more seconds than `SECONDS`.
"""

import json
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from unittest import mock

import torch
import transformers
from safetensors.torch import load_file, save_file

import hf_unigd
from attack.outcomes import Outcomes
from hf_unigd import UniGDForConditionalGeneration
from hf_unigd.hub import doctor, doctor_files, examine, load_checkpoint, save_digests
from hf_unigd.hub.findings import OK
from hf_unigd.hub.limits import limited
from hf_unigd.modeling import adapter_unigd, checkpoint_unigd, configuration_unigd, digests_unigd, processing_unigd
from tiny_adapters import SEQUENCES, make_adapter
from tiny_models import make_vlm


PACKAGE = str(Path(hf_unigd.__file__).parent)
SECONDS, GIGABYTES = 8, 8  # that a case may take, beside what the process has already
TOO_LONG = "takes more time than any case may"
# What a file may become. A healthy half of it is one more.
CONTENTS = {
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "an empty dict": b"{}",
    "a text": b'"x"',
    "binary": bytes(range(256)) * 4,
    "not UTF-8": b'{"a": "\xe9"}',
    "nested deeply": b"[" * 100_000,
    "a number of many digits": b"9" * 100_000,
}
VALUES = (None, [], {}, "x", -1, 0, 1 << 24, 10**9, 10**30, 1.5, float("nan"), {"x": [{}]})
# Nothing but sentence-transformers reads these, and it has defaults.
OPTIONAL = {"config_sentence_transformers.json", "sentence_bert_config.json", "modules.json", "digests.json"}


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        label: What is damaged, and how.
        kind: `"whole"` or `"adapter"`.
        damage: Damages a copy of the checkpoint in a folder.
        is_seen: Whether the doctor must report it, even if the embeddings stay the same.
        is_loaded: Whether to load it too.
    """

    label: str
    kind: str
    damage: Callable[[Path], object]
    is_seen: bool = True
    is_loaded: bool = True


@cache
def healthy() -> tuple[tempfile.TemporaryDirectory, dict[str, Path]]:
    folder = tempfile.TemporaryDirectory()
    make_adapter(Path(folder.name), on="ours")
    return folder, {"whole": Path(folder.name, "base"), "adapter": Path(folder.name, "adapter")}


@cache
def expected(kind: str) -> tuple[set, torch.Tensor]:
    """What the doctor finds that is not OK, and the embeddings."""
    folder = healthy()[1][kind]
    return {finding for finding in examine(folder) if finding.level != OK}, embed(folder)


def embed(folder: Path, **kwargs) -> torch.Tensor:
    model, processor = load_checkpoint(str(folder), **kwargs)
    with torch.no_grad():
        return model.embed(**processor.process_sequences(SEQUENCES))


def file_cases(kind: str, names: list[str]) -> Iterator[Case]:
    def write(folder: Path, name: str, content: bytes | None):
        file = folder / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content is None else content)

    def replace(folder: Path, name: str, make: Callable[[Path], object]):
        (folder / name).unlink()
        make(folder / name)

    for name in names:
        is_seen = name not in OPTIONAL
        for label, content in {**CONTENTS, "half of it": None}.items():
            yield Case(f"{name} is {label}", kind, lambda f, n=name, c=content: write(f, n, c), is_seen)
        others = {"missing": lambda path: None, "a folder": Path.mkdir, "a dangling link": link_to_nothing}
        for label, make in others.items():
            yield Case(f"{name} is {label}", kind, lambda f, n=name, m=make: replace(f, n, m), is_seen)


def code_cases() -> Iterator[Case]:
    for file in sorted(healthy()[1]["whole"].glob("*.py")):
        yield Case(f"{file.name} is edited", "whole", lambda f, n=file.name: append(f / n, b"# edited\n"))


def append(file: Path, content: bytes) -> None:
    file.write_bytes(file.read_bytes() + content)


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def value_cases(kind: str, name: str) -> Iterator[Case]:
    """Each key of a JSON file, at any depth, with two of the values in turn, and without its value."""
    values = cycle(VALUES)
    for path in key_paths(json.loads((healthy()[1][kind] / name).read_text())):
        for value in islice(values, 2):
            label = f"{name}: {'.'.join(path)} = {json.dumps(value)}"
            yield Case(label, kind, lambda f, p=path, v=value: change_json(f, name, p, lambda o, k: o.update({k: v})))
        yield Case(f"{name}: no {'.'.join(path)}", kind, lambda f, p=path: change_json(f, name, p, dict.pop))


def key_paths(content, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in content.items() if isinstance(content, dict) else ():
        yield (*before, key)
        yield from key_paths(value, (*before, key))


def change_json(folder: Path, name: str, path: tuple[str, ...], change: Callable, renew: bool = False) -> None:
    """Changes the dict that holds the last key of `path`. If `renew`, as somebody who renews the digests would."""
    whole = content = json.loads((folder / name).read_text())
    for key in path[:-1]:
        content = content[key]
    change(content, path[-1])
    # A space, so that a value that was there before is a change as well.
    (folder / name).write_text(json.dumps(whole) + " ")
    if renew:
        save_digests(folder)


def tensor_cases(kind: str, name: str) -> Iterator[Case]:
    """The lowest bit of one value of each tensor is another."""

    def damage(folder: Path, key: str):
        tensors = load_file(folder / name)
        tensors[key].reshape(-1)[-1:].view(torch.uint8)[0] ^= 1
        save_file(tensors, folder / name, metadata={"format": "pt"})

    for key in load_file(healthy()[1][kind] / name):
        yield Case(f"{name}: noise in {key}", kind, lambda f, k=key: damage(f, k))


def special_cases() -> Iterator[Case]:
    """Each of these was, or would be, missed by another check than its own."""

    def set_value(kind: str, name: str, *path: str, value, renew: bool = True) -> Case:
        def damage(folder: Path):
            change_json(folder, name, path, lambda o, k: o.update({k: value}), renew)

        return Case(f"{name}: {'.'.join(path)} = {value!r}", kind, damage)

    def noise_in_unused_row(folder: Path):
        tensors = load_file(folder / "model.safetensors")
        tensors[next(key for key in tensors if "embed_tokens" in key)][-1] += 1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def name_itself(folder: Path):
        change_json(
            folder,
            "adapter_config.json",
            ("base_model_name_or_path",),
            lambda o, k: o.update({k: str(folder)}),
            renew=True,
        )

    def name_other_module(folder: Path):
        modules = json.loads((folder / "modules.json").read_text())
        modules[0]["type"] = "somebody/else--sentence_unigd.UniGDSentenceModule"
        (folder / "modules.json").write_text(json.dumps(modules))

    def name_missing_shards(folder: Path):
        (folder / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": {"a": "../model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    yield Case("noise in a row of the embeddings that no text uses", "whole", noise_in_unused_row)
    yield Case("an adapter that names itself", "adapter", name_itself)
    yield Case("modules.json names a module elsewhere", "whole", name_other_module)
    yield Case("an index that names a file outside", "whole", name_missing_shards)
    layers = ("vlm_config", "text_config", "num_hidden_layers")
    yield set_value("whole", "config.json", "auto_map", "AutoModel", value="somebody/else--modeling_unigd.UniGDModel")
    yield set_value("whole", "config.json", *layers, value=100_000)
    yield set_value("whole", "config.json", *layers, value=10**9)
    yield set_value("whole", "config.json", "transformers_version", value="none at all")
    yield set_value("whole", "config.json", "vlm_config", value={"model_type": "unigd"})
    yield set_value("whole", "processor_config.json", "vlm_processor_class", value="AutoProcessor")
    yield set_value("adapter", "adapter_config.json", "r", value=1 << 30)
    long = b"{{ 'a' * 200000000 }}"
    yield Case("a template that writes a lot", "whole", lambda f: append(f / "chat_template.jinja", long))
    loop = "{%- for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor -%}"
    # transformers runs templates in a sandbox without a limit of time, so loading it would not end.
    yield Case(
        "a template that takes days", "whole", lambda f: (f / "chat_template.jinja").write_text(loop), True, False
    )


def cases(bounded: bool) -> list[Case]:
    found: list[Case] = []
    for kind, folder in healthy()[1].items():
        names = sorted(file.name for file in folder.iterdir() if file.is_file() and file.suffix != ".py")
        if kind == "adapter":  # all else is as beside a whole model
            names = [name for name in names if name.startswith("adapter")]
        found += file_cases(kind, names)
        for name in {"whole": ("config.json", "processor_config.json"), "adapter": ("adapter_config.json",)}[kind]:
            found += value_cases(kind, name)
        found += tensor_cases(kind, "model.safetensors" if kind == "whole" else "adapter_model.safetensors")
    found += [*tensor_cases("whole", "probe.safetensors"), *code_cases()]
    return [*special_cases(), *(found[:: len(found) // 12] if bounded else found)]


def judge(case: Case, folder: Path) -> tuple[str, str]:
    """`"right"`, `"refused"` or `"wrong"`, and why."""
    shutil.copytree(healthy()[1][case.kind], folder)
    findings, embeddings = expected(case.kind)
    case.damage(folder)
    try:
        with bounds("the doctor"):
            found = [finding for finding in examine(folder) if finding.level != OK and finding not in findings]
    except Exception as error:
        return "wrong", f"the doctor died of {type(error).__name__}: {error}"
    if any(TOO_LONG in finding.text for finding in found):
        return "wrong", "the doctor takes too long"
    verdict = "right"
    try:
        with bounds("loading"):
            for verify in ("probe", "digests") if case.is_loaded else ():
                is_same = torch.equal(embed(folder, verify=verify), embeddings)
    except (ValueError, RuntimeError, OSError) as error:
        if not str(error).strip() or is_endless(error) or TOO_LONG in str(error):
            return "wrong", f"loading raises {type(error).__name__}: {error}"
        verdict = "refused"
    except Exception as error:
        return "wrong", f"loading raises {type(error).__name__}: {error}"
    if not found and (case.is_seen or verdict == "refused"):
        return "wrong", "the doctor does not see it"
    if verdict == "right" and case.is_loaded and not is_same:
        return "wrong", "it loads with every check, and embeds otherwise"
    return verdict, ""


@contextmanager
def bounds(what: str) -> Iterator[None]:
    """Of time and memory, so that a fault is a line, and not the end of this process. The time is that of the
    processor, because others may be at work on this machine; more than thrice as much is too long anyhow."""
    started = time.process_time()
    with (
        limited(3 * SECONDS, GIGABYTES, f"{what} {TOO_LONG}"),
        mock.patch.object(doctor, "PROCESSOR_SECONDS", SECONDS // 2),
    ):
        yield
    if time.process_time() - started > SECONDS:
        raise TimeoutError(f"{what} {TOO_LONG}: {time.process_time() - started:.0f} seconds")


def is_endless(error: Exception) -> bool:
    """Whether a recursion of ours ended in this error."""
    frames = traceback.extract_tb(error.__traceback__)
    return sum(frame.filename.startswith(PACKAGE) for frame in frames) > 50


def attack_saves(outcomes: Outcomes, folder: Path) -> None:
    """Saves a whole model over other models, which is refused before anything is written, and over itself."""
    model = UniGDForConditionalGeneration.from_vlm(make_vlm("llava").model, head_type="mlp", embedding_dim=8)
    other = UniGDForConditionalGeneration.from_vlm(make_vlm("llava").model, head_type="linear", embedding_dim=4)
    model.verify_saves = other.verify_saves = False
    make_vlm("llava").model.save_pretrained(folder / "a plain model")
    other.save_pretrained(folder / "another head")
    shutil.copytree(healthy()[1]["adapter"], folder / "an adapter")
    model.save_pretrained(folder / "itself")
    (folder / "itself" / "checkpoint-1").mkdir()
    for name in ("a plain model", "another head", "an adapter", "itself"):
        before = {file: file.read_bytes() for file in (folder / name).iterdir() if file.is_file()}
        try:
            model.save_pretrained(folder / name)
        except FileExistsError as error:
            now = {file: file.read_bytes() for file in (folder / name).iterdir() if file.is_file()}
            if name == "itself" or now != before:
                outcomes.wrong.append(f"saving over {name} is refused, or only after files were written: {error}")
            else:
                outcomes.refused += 1
        else:
            if name == "itself":
                outcomes.right += 1
            else:
                outcomes.wrong.append(f"saving over {name} is not refused")


def run(bounded: bool) -> Outcomes:
    outcomes = Outcomes("Damaged checkpoints")
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(cases(bounded)):
            verdict, why = judge(case, Path(folder, str(number)))
            outcomes.right += verdict == "right"
            outcomes.refused += verdict == "refused"
            outcomes.wrong += [f"{case.kind}, {case.label}: {why}"] if verdict == "wrong" else []
            shutil.rmtree(Path(folder, str(number)))
        attack_saves(outcomes, Path(folder))
    return outcomes


@contextmanager
def patched(*changes: tuple[object, str, object]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, name, replacement in changes:
            stack.enter_context(mock.patch.object(module, name, replacement))
        yield


def compared_in_part(kind: str) -> Callable:
    """The comparison of digests, which sees only one kind of them."""
    compare = digests_unigd.digest_differences

    def compare_in_part(*args):
        return [difference for difference in compare(*args) if difference.startswith(kind)]

    def planted():
        return patched(
            (digests_unigd, "digest_differences", compare_in_part),
            (doctor_files, "digest_differences", compare_in_part),
        )

    return planted


def unbounded(name, files=None) -> nullcontext:
    return nullcontext()


def not_caught(subject, check, *args):
    return check(*args)


def any_processor(class_name, name, **kwargs):
    return getattr(transformers, class_name).from_pretrained(name, **kwargs)


PLANTED = {
    "digests of tensors are not compared": compared_in_part("files"),
    "digests of files are not compared": compared_in_part("tensors"),
    "code of another repository is not seen": lambda: patched(
        (doctor_files, "_code_references", lambda content: iter(()))
    ),
    "a config may ask for any number of layers": lambda: patched(
        (checkpoint_unigd, "as_large_as", unbounded), (configuration_unigd, "check_sizes", unbounded)
    ),
    "an adapter may name itself": lambda: patched((adapter_unigd, "is_adapter", lambda name, kwargs: False)),
    "a processor may be an Auto class": lambda: patched((processing_unigd, "load_backbone_processor", any_processor)),
    "an error of a check is one of the doctor": lambda: patched(
        (doctor, "attempt", not_caught), (doctor_files, "attempt", not_caught)
    ),
    "a save goes into any folder": lambda: patched((checkpoint_unigd, "check_save_folder", lambda *_, **__: None)),
}

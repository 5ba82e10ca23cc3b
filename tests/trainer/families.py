"""Runs every backbone family through everything that hf-unigd does with a backbone.

`make families` runs all families and writes docs/backbones.md. `tests/trainer/test_families.py` runs a part.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from hf_unigd import UniGDConfig, UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.data.example import image_key
from hf_unigd.hub import load_checkpoint
from hf_unigd.hub.export import export_checkpoint
from hf_unigd.modeling.head_unigd import pool_spans
from hf_unigd.trainer import UniGDTrainer, UniGDTrainingArguments
from hf_unigd.trainer.stored_images import without_pixels
from hf_unigd.trainer.vision import is_frozen, vision_parameters, with_image_features
from hf_unigd.trainer.vision_cache import VisionFeatureCache
from tiny_models import make_image, make_vlm, stand_ins
from tiny_models.building import BUILDERS
from tiny_teachers import save_teachers
from trainer_cases import make_rows, make_trainer


NOT_RUN = "not run"
SHAPES = ((24, 20), (20, 44), (48, 16))  # images of several shapes, so that some are cut into tiles


def images(count=4):
    return [make_image(place, SHAPES[place % len(SHAPES)]) for place in range(count)]


def sequences():
    a, b, c, d = images()
    return ["a red cat", [a], [b, "red"], ["red", c, "green", d, a, "blue"], [b, c]]


class Family:
    """A family's tiny model with large weights, so that a leak shows, wrapped and with a processor."""

    def __init__(self, name: str, **config_kwargs):
        self.name = name
        tiny = make_vlm(name)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in tiny.model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.15)
        self.backbone = tiny.model
        self.processor = UniGDProcessor(tiny.processor)
        self.model = UniGDForConditionalGeneration.from_vlm(tiny.model, **config_kwargs)
        self.model.processor = self.processor


@torch.no_grad()
def check_inputs(family: Family, _folder: Path) -> None:
    """A sequence that the template renders as it is given gets the tokens that the backbone's processor makes, and
    every sequence keeps the number and order of its texts and images."""
    image = make_image(0)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a red cat"}]}]
    prompt = family.processor.vlm_processor.apply_chat_template(messages, add_generation_prompt=True)
    bos = family.processor.tokenizer.bos_token
    expected = family.processor.vlm_processor(
        text=[prompt], images=[[image]], add_special_tokens=not (bos and prompt.startswith(bos)), return_tensors="pt"
    )
    ours = family.processor.process_sequences([[image, "a red cat"]], prompted=False)
    assert ours["input_ids"].tolist() == expected["input_ids"].tolist(), "other tokens than the backbone's processor"
    batch = family.processor.process_sequences(sequences(), prompted=False)
    text = family.processor.tokenizer.decode(batch["input_ids"][3])
    patch = family.processor.tokenizer.decode([family.processor._tokenize.patch_id])
    middle = text[text.index("red") : text.index("blue")]
    assert text.index("red") < text.index("green") < text.index("blue")
    assert patch in middle.partition("green")[0] and patch in middle.partition("green")[2]


@torch.no_grad()
def check_speech(family: Family, _folder: Path) -> None:
    """Logits are bit-equal to the backbone's, the loss agrees with its own, and it generates the same tokens."""
    targets = ["two blue dogs", None, "a car", "green grass", None]
    batch = family.processor.process_sequences(sequences(), targets, padding_side="left")
    plain = {name: value for name, value in batch.items() if name not in ("spans", "labels")}
    theirs = family.backbone(**plain, labels=batch["labels"])
    ours = family.model(**batch)
    assert torch.equal(ours.logits, theirs.logits), f"logits differ by {(ours.logits - theirs.logits).abs().max()}"
    reference = torch.nn.functional.cross_entropy(
        theirs.logits[:, :-1].flatten(0, 1).double(), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    assert abs(ours.loss - reference) < 1e-5 * max(1, abs(reference)), f"loss {ours.loss}, {reference}"
    prompts = family.processor.process_sequences(sequences(), prompted=False, padding_side="left")
    plain = {name: value for name, value in prompts.items() if name != "spans"}
    kwargs = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(family.model.generate(**prompts, **kwargs), family.backbone.generate(**plain, **kwargs))


@torch.no_grad()
def check_embeddings(family: Family, _folder: Path) -> None:
    """An embedding depends neither on the side of padding, nor on the batch, nor on the target that follows."""
    given = sequences()
    alone = torch.cat([family.model.embed(**family.processor.process_sequences([each])) for each in given])
    targets = ["two blue dogs on the grass", "a car", None, "a yellow car, seen from the left", "green"]
    for side in ("left", "right"):
        for answers in (None, targets):
            batch = family.processor.process_sequences(given, answers, padding_side=side)
            difference = (family.model.embed(**batch) - alone).abs().max().item()
            assert difference < 1e-5, f"padding on the {side}, answers {answers is not None}: {difference:.1e}"
    assert (alone[1:] @ alone[1:].T - torch.eye(4)).abs().max() > 1e-3
    assert not torch.allclose(alone[0], alone[1], atol=1e-3), "all embeddings are alike"


def _final_weights(family: str, folder: Path, **kwargs) -> dict[str, torch.Tensor]:
    trainer = make_trainer(folder, make_rows(8), family=family, max_steps=2, learning_rate=1e-3, **kwargs)
    frozen = kwargs.get("freeze_vision_tower", True)
    assert is_frozen(trainer.accelerator.unwrap_model(trainer.model)) == frozen
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    changed = {id(after[name]) for name, value in before.items() if not torch.equal(value, after[name])}
    tower = {id(parameter) for parameter in vision_parameters(trainer.accelerator.unwrap_model(trainer.model))}
    assert changed - tower, "the language model is unchanged"
    assert frozen or changed & tower, "the vision tower is unchanged"
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(torch.isfinite(torch.tensor(losses))), f"losses {losses}"
    return {name: after[name].detach() for name in before}


def _lora():
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def check_vladva(family: Family, folder: Path) -> None:
    """Two steps with LoRA, soft prompts and a frozen vision tower."""
    _final_weights(family.name, folder, peft_config=_lora(), soft_prompts=True)


def check_gradient_cache(family: Family, folder: Path) -> None:
    """The gradient cache gives the weights that a run without it gives."""
    lora = {"peft_config": _lora(), "soft_prompts": True}
    cached = _final_weights(family.name, folder, **lora, gradient_cache_chunk_size=3)
    for name, value in _final_weights(family.name, folder, **lora).items():
        difference = (cached[name] - value).abs().max().item()
        # AdamW divides by the gradient's size, which turns rounding of tiny gradients into a part of the step.
        assert difference < 2e-4, f"{name} differs by {difference:.1e}"


def check_full(family: Family, folder: Path) -> None:
    """Two steps of the whole model, the vision tower included."""
    _final_weights(family.name, folder, freeze_vision_tower=False)


def check_sugar(family: Family, folder: Path) -> None:
    """Spans hold each image's tokens and no other's; then two steps with the structure loss."""
    batch = family.processor.process_sequences(
        sequences(), ["A car. Two dogs.", None, None, None, "green"], image_lengths=True, sentence_ends=_sentence_ends
    )
    is_patch = batch["input_ids"] == family.backbone.config.to_dict().get(
        "image_token_id", getattr(family.backbone.config, "image_token_index", None)
    )
    spans = batch["slice_spans"]
    covered = torch.zeros_like(is_patch)
    lengths = []
    for row, start, end in spans.tolist():
        if is_patch[row, start] and is_patch[row, end - 1]:
            assert not (covered[row, start:end] & is_patch[row, start:end]).any(), "two spans hold the same token"
            covered[row, start:end] = True
            lengths.append(int(is_patch[row, start:end].sum()))
    assert (is_patch & ~covered).sum() == 0, "an image's token is in no span"
    assert lengths == batch["image_lengths"].tolist(), f"{lengths} tokens, {batch['image_lengths'].tolist()} expected"

    teachers = save_teachers(folder / "teachers")
    tiny = make_vlm(family.name)
    rows = Dataset.from_dict(
        {
            "messages": [
                [
                    {"role": "user", "content": f"A red cat {n}.<image><image>It sees a dog.<image>"},
                    {"role": "assistant", "content": f"A car {n}. It is blue."},
                ]
                for n in range(4)
            ],
            "images": [[make_image(n), make_image(10 + n, (20, 44)), make_image(20 + n)] for n in range(4)],
        }
    )
    args = UniGDTrainingArguments(
        trust_caption_columns=True,
        output_dir=str(folder / "sugar"),
        per_device_train_batch_size=4,
        max_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        alignment_weight=1.0,
        contrastive_weight=0.0,
        **vars(teachers),
    )
    trainer = UniGDTrainer(
        UniGDForConditionalGeneration.from_vlm(tiny.model, head_type="mlp", embedding_dim=8),
        args,
        train_dataset=rows,
        processing_class=UniGDProcessor(tiny.processor, embedding_position="last_slice"),
    )
    trainer.train()
    logs = [entry["alignment_loss"] for entry in trainer.state.log_history if "alignment_loss" in entry]
    assert len(logs) == 2 and all(torch.isfinite(torch.tensor(logs))), f"losses {logs}"


def _sentence_ends(text):
    return sorted({place + 1 for place, character in enumerate(text) if character == "."} | {len(text)})


@torch.no_grad()
def check_vision_cache(family: Family, folder: Path) -> None:
    """Features from disk, in another order and another batch, give the embeddings of the vision tower."""
    cache = VisionFeatureCache(folder / "features", "tower")

    def chunk(given):
        inputs = dict(family.processor.process_sequences(given, image_lengths=True))
        lengths = inputs.pop("image_lengths").tolist()
        inside = [part for each in given for part in (each if isinstance(each, list) else [each])]
        shown = [part for part in inside if not isinstance(part, str)]
        inputs["image_keys"] = [(image_key({"image": image}), n) for image, n in zip(shown, lengths, strict=True)]
        return inputs

    sizes_alone = without_pixels(family.processor)
    given = sequences()
    for part in (given, given[2:], [given[3], given[1]], [given[1]]):
        inputs = chunk(part)
        computed = with_image_features(family.model, inputs)
        stored = with_image_features(family.model, inputs, cache)
        if sizes_alone is not None:
            cache.flush()
            by_sizes = dict(sizes_alone.process_sequences(part, image_lengths=True))
            lengths = by_sizes.pop("image_lengths").tolist()
            assert lengths == [length for _, length in inputs["image_keys"]], f"other numbers of tokens: {lengths}"
            del by_sizes["pixel_values"]
            stored = with_image_features(family.model, {**by_sizes, "image_keys": inputs["image_keys"]}, cache)
        for features in (computed, stored):
            assert "pixel_values" not in features, "the backbone takes no image features"
            plain = {name: value for name, value in inputs.items() if name != "image_keys"}
            difference = (family.model.embed(**features) - family.model.embed(**plain)).abs().max().item()
            assert difference < 1e-5, f"differs by {difference:.1e}"


@torch.no_grad()
def check_save(family: Family, folder: Path) -> None:
    """Saved, loaded by us, and loaded in a process without us."""
    family.model.save_pretrained(folder)
    batch = family.processor.process_sequences(sequences(), padding_side="left")
    again = UniGDForConditionalGeneration.from_pretrained(folder)
    assert torch.equal(again.embed(**batch), family.model.embed(**batch)), "loaded, it embeds otherwise"
    torch.save({"inputs": dict(batch), "embeddings": family.model.embed(**batch)}, folder / "expected.pt")


def check_adapter(family: Family, folder: Path) -> None:
    """An adapter on a base model in a folder is saved, and embeds the same when loaded."""
    base = folder / "base"
    family.backbone.save_pretrained(base)
    family.processor.vlm_processor.save_pretrained(base)
    model = UniGDForConditionalGeneration.from_vlm_pretrained(base)
    processor = UniGDProcessor(copy.deepcopy(family.processor.vlm_processor))
    model.add_soft_prompts(**processor.add_soft_prompts())
    args = UniGDTrainingArguments(
        trust_caption_columns=True,
        output_dir=str(folder / "run"),
        max_steps=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=4,
    )
    trainer = UniGDTrainer(model, args, train_dataset=make_rows(4), processing_class=processor, peft_config=_lora())
    trainer.train()
    loaded = mock.patch.object(UniGDProcessor, "from_pretrained", lambda *_, **__: copy.deepcopy(processor))
    with loaded if stand_ins(family.name) else nullcontext():
        trainer.save_model(folder / "adapter")
        again = UniGDForConditionalGeneration.from_pretrained(folder / "adapter")
    batch = processor.process_sequences(sequences())
    trained = trainer.accelerator.unwrap_model(trainer.model).eval()
    with torch.no_grad():
        difference = (again.embed(**batch) - trained.embed(**batch)).abs().max().item()
    assert difference < 1e-5, f"loaded, it embeds otherwise, by {difference:.1e}"


def check_export(family: Family, folder: Path) -> None:
    """`hf-unigd export DIR --to vlm --output NEW` writes a plain model, whose last hidden states embed the same."""
    if stand_ins(family.name):
        raise NotRunError("the processor needs torchvision to be loaded")
    family.model.save_pretrained(folder / "checkpoint")
    export_checkpoint(str(folder / "checkpoint"), folder / "export", to="vlm")
    plain = AutoModelForImageTextToText.from_pretrained(folder / "export")
    batch = family.processor.process_sequences(sequences())
    inputs = {name: value for name, value in batch.items() if name != "spans"}
    with torch.no_grad():
        hidden = plain.base_model(**inputs).last_hidden_state
        embeddings = torch.nn.functional.normalize(pool_spans(hidden, batch["spans"]), dim=-1)
        assert torch.allclose(embeddings, family.model.embed(**batch), atol=1e-5)
    load_checkpoint(str(folder / "checkpoint"))


class NotRunError(Exception):
    """A check that cannot be run here."""


CHECKS: dict[str, Callable[[Family, Path], None]] = {
    "inputs": check_inputs,
    "speech": check_speech,
    "embeddings": check_embeddings,
    "VladVA": check_vladva,
    "gradient cache": check_gradient_cache,
    "full": check_full,
    "Sugar": check_sugar,
    "vision cache": check_vision_cache,
    "save": check_save,
    "adapter": check_adapter,
    "export": check_export,
}


def run_check(name: str, check: str, folder: Path) -> str:
    """The result of a check: `"ok"`, `"not run"` with a reason, or what went wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        family = Family(name)
    except ModuleNotFoundError as reason:  # older versions of transformers need torchvision for more processors
        return f"{NOT_RUN}: {reason}"
    try:
        CHECKS[check](family, folder)
    except NotRunError as reason:
        return f"{NOT_RUN}: {reason}"
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return "ok"


STRANGER = """
import json, sys
sys.modules["hf_unigd"] = None  # any import of it raises
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

for folder in sys.argv[1:]:
    try:
        expected = torch.load(f"{folder}/expected.pt")
        embedder = AutoModel.from_pretrained(folder, trust_remote_code=True)
        speaker = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        with torch.no_grad():
            now = [model.embed(**expected["inputs"]) for model in (embedder, speaker)]
        same = all(torch.allclose(each, expected["embeddings"], atol=1e-5) for each in now)
        results = ["ok" if same else "it embeds otherwise"]
        try:
            AutoProcessor.from_pretrained(folder, trust_remote_code=True)
            results.append("ok")
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
    except Exception as error:
        results = [f"{type(error).__name__}: {error}"] * 2
    print(json.dumps([folder, results]), flush=True)
"""  # fmt: skip


def strangers(folders: dict[str, Path]) -> dict[str, str]:
    """Loads checkpoints in one process that has no hf-unigd: the result of each family."""
    names = {str(folder): name for name, folder in folders.items()}
    process = subprocess.run(
        [sys.executable, "-c", STRANGER, *names],
        capture_output=True,
        text=True,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(next(iter(folders.values())) / "modules")},
        check=False,
    )
    found = dict(json.loads(line) for line in process.stdout.splitlines() if line.startswith("["))
    results = {}
    for folder, name in names.items():
        model, processor = found.get(folder, [process.stderr[-500:]] * 2)
        results[name] = processor if model == "ok" else model
        if model == "ok" and stand_ins(name):  # the real processor needs torchvision
            results[name] = "ok, processor not run"
    return results


def walk() -> dict[str, str]:
    """What becomes of every type of transformers' image-text-to-text mapping, with its default config and no weights:
    `"wrapped"`, the message by which it is refused, or `"not buildable"` by transformers itself."""
    return {name: _wrap_default(name) for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}


def _wrap_default(name: str) -> str:
    try:
        config = AutoConfig.for_model(name)
        with torch.device("meta"):
            vlm = AutoModelForImageTextToText.from_config(config)
    except Exception as error:  # transformers' own failure
        return f"not buildable: {type(error).__name__}"
    try:
        with torch.device("meta"):
            UniGDForConditionalGeneration.from_vlm(vlm)
        UniGDConfig(vlm_config=AutoConfig.for_model(name))
    except ValueError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"crashed: {type(error).__name__}: {error}"
    return "wrapped"


HEADER = """\
# Backbones

The backbone can be any decoder-only model that `AutoModelForImageTextToText` loads. What a family does is found by
looking at it, not by its name: logits come from the backbone's own forward, with the scaling or capping that it
applies; what its vision tower returns is handed on whole; the tokens of an image are those that its processor puts
there. A family that lacks something is refused in one sentence when it is wrapped.

`make families` writes this page. It runs a tiny random model of every family below, whose config has every scaling
as released, with the family's own processor and a chat template written after the released one:

| column | what must hold |
|---|---|
{columns}

{table}

Where a part of a processor needs torchvision, something stands in for it here, as the last column says. **These
processors need torchvision in transformers; the others load without it**, as the column `save` shows: transformers
then uses its Pillow image processors. The two kinds resize differently at edges, which the probe of a checkpoint
allows for. The towers of `fast_vlm` and `perception_lm` are timm's, which is no dependency of ours; a ResNet and a
CLIP tower stand for them. "Not run" means that a check could not be run here, because it loads such a processor.

## Every type of the mapping

transformers {version} has {count} types of image-text-to-text models. With its default config and without weights,
each is wrapped, refused, or not buildable by transformers itself from its defaults (or without timm):

{walk}

`UniGDProcessor` also refuses processors without `replace_image_token`, such as Idefics2's, because they do not say by
which tokens they replace an image, and those that process no text without an image.

## Good to know

- **Prompts** are rendered by the backbone's own chat template. If it puts all images of a turn first, a turn in
  which a text comes before an image is rendered as one text with placeholders, so that the order is kept.
- **Dates.** A template that writes today's date (Mistral's) would make other inputs tomorrow. The date is frozen
  when the processor is made, with a warning, and saved.
- **Reserved tokens** (placeholders of images and videos, marks of turns, the end of a sequence, soft prompts) are
  refused in every text of a row, by the row's number, when the rows are checked.
- **Videos** are refused by name.
- **A frozen tower** runs in evaluation mode, so that batch normalisation and dropout do not change it.
- **SmolVLM** needs `pip install num2words`, for transformers' processor.
- **`transformers serve` and `transformers chat`** find classes of transformers alone, so they do not serve a
  checkpoint of ours. `hf-unigd export you/model --to vlm --output served` writes a plain model of the family, which
  they serve ([serving.md](serving.md)).
"""


def table(results: dict[str, dict[str, str]], checks: list[str]) -> str:
    lines = ["| family | " + " | ".join([*checks, "stand-ins"]) + " |", "|---" * (len(checks) + 2) + "|"]
    for name, row in results.items():
        cells = [NOT_RUN if row[check].startswith(NOT_RUN) else row[check] for check in checks]
        lines.append(f"| {name} | " + " | ".join([*cells, stand_ins(name)]) + " |")
    return "\n".join(lines)


def page(results: dict[str, dict[str, str]], mapping: dict[str, str]) -> str:
    """The text of docs/backbones.md."""
    columns = "\n".join(f"| {name} | {' '.join((check.__doc__ or '').split())} |" for name, check in CHECKS.items())
    kinds: dict[str, list[str]] = {}
    for name, result in mapping.items():
        kinds.setdefault(result, []).append(f"`{name}`")
    kinds = dict(sorted(kinds.items(), key=lambda kind: -len(kind[1])))
    rows = "\n".join(f"| {kind} | {', '.join(names)} |" for kind, names in kinds.items())
    return HEADER.format(
        columns=columns,
        table=table(results, list(CHECKS)),
        version=transformers.__version__,
        count=len(mapping),
        walk=f"| with defaults | types |\n|---|---|\n{rows}",
    )


def is_good(result: str) -> bool:
    return result.startswith(("ok", NOT_RUN))


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs every family and writes docs/backbones.md.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[2] / "docs" / "backbones.md")
    parser.add_argument("--families", nargs="*", help="Only these. Prints the table, and writes nothing.")
    parser.add_argument("--checks", nargs="*", help="Only these. Prints the table, and writes nothing.")
    args = parser.parse_args()
    checks = args.checks or list(CHECKS)
    results: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for name in args.families or list(BUILDERS):
            results[name] = {check: run_check(name, check, root / name / check) for check in checks}
            bad = [f"{check}: {value[:300]}" for check, value in results[name].items() if not is_good(value)]
            print(name, "; ".join(bad) or "ok", file=sys.stderr, flush=True)
        if "save" in checks:
            saved = {name: root / name / "save" for name, row in results.items() if row["save"] == "ok"}
            for name, result in strangers(saved).items():
                results[name]["save"] = result
    bad = [name for name, row in results.items() if not all(is_good(result) for result in row.values())]
    if args.families or args.checks:
        print(table(results, checks))
    else:
        mapping = walk()
        bad += [name for name, result in mapping.items() if result.startswith("crashed")]
        args.output.write_text(page(results, mapping), encoding="utf-8")
        print(f"{len(results)} families, {len(mapping)} types; {args.output}")
    print(f"failed: {bad}" if bad else "no failure")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()

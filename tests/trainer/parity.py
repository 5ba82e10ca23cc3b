"""Compares the gradient of one global batch with an oracle, for every way to run a step.

The oracle runs each row on its own through the backbone, without padding, and computes the losses in one process.
`make parity` runs every case and writes docs/parity.md. `tests/trainer/test_parity.py` runs a subset.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import TrainerCallback

import hf_unigd.trainer.trainer as trainer_module
from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.data import RowParser, SentenceSplitter
from hf_unigd.data.teachers import slice_columns
from hf_unigd.trainer import UniGDTrainer, UniGDTrainingArguments
from hf_unigd.trainer.prefixes import PrefixSampler
from tiny_models import make_image, make_vlm
from trainer_cases import Reference


TOLERANCE = 1e-6
RECIPES = {
    "vladva": {"contrastive_weight": 0.5, "causal_lm_weight": 2.0},
    "sugar": {"contrastive_weight": 0.0, "alignment_weight": 1.0, "causal_lm_weight": 0.7},
    "joint": {"contrastive_weight": 0.5, "alignment_weight": 0.8, "causal_lm_weight": 1.0},
}
# Rows of the global batch, per process and accumulation step.
LAYOUTS = {
    "1 process": [[[0, 1, 2, 3, 4, 5, 6, 7]]],
    "4 steps": [[[0, 4], [1, 5], [2, 7], [3, 6]]],
    "2 processes": [[[0, 1, 2, 3]], [[4, 5, 6, 7]]],
    "2 processes, 2 steps": [[[0, 1], [2, 3]], [[4, 5], [6, 7]]],
    "2 processes, uneven": [[[0, 1, 2, 3, 6, 7]], [[4, 5]]],
    "2 processes, one without targets": [[[0, 1, 3, 6, 7]], [[2, 4, 5]]],
    "2 processes, one without images": [[[0, 1, 2, 3, 5, 7]], [[4, 6]]],
    "4 processes": [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]],
    "4 processes, uneven": [[[0, 1, 2, 3, 5]], [[7]], [[4]], [[6]]],
}


@dataclass(frozen=True)
class Case:
    recipe: str
    model: str = "full"  # or "lora", which trains LoRA, soft prompts and the head
    layout: str = "1 process"
    chunk_size: int | None = None
    across: bool = False  # `negatives_across_accumulation`
    dropout: bool = False
    checkpointing: bool = False
    train_vision: bool = False
    fsdp: bool = False
    in_subset: bool = True

    @property
    def name(self) -> str:
        extras = {
            "negatives across steps": self.across,
            "dropout": self.dropout,
            "gradient checkpointing": self.checkpointing,
            "vision tower trained": self.train_vision,
            "FSDP2": self.fsdp,
        }
        chunk = "" if self.chunk_size is None else f"gradient cache, chunks of {self.chunk_size}"
        return ", ".join([self.layout, *filter(None, [chunk]), *(name for name, on in extras.items() if on)])

    @property
    def world_size(self) -> int:
        return len(LAYOUTS[self.layout])

    @property
    def groups(self) -> list[list[int]]:
        """The groups of rows that are contrasted with each other."""
        layout = LAYOUTS[self.layout]
        steps = [[row for rank in layout for row in rank[step]] for step in range(len(layout[0]))]
        return [[row for step in steps for row in step]] if self.across else steps


def cases() -> list[Case]:
    found = []
    for recipe in RECIPES:
        for model in ("full", "lora"):
            for layout in LAYOUTS:
                base = Case(recipe, model, layout, in_subset=recipe == "joint" and model == "lora")
                base = replace(base, in_subset=base.in_subset and base.world_size < 4)
                whole = replace(base, in_subset=base.in_subset and layout in ("1 process", "2 processes, uneven"))
                found += [whole, replace(base, chunk_size=3)]
                if layout in ("1 process", "2 processes"):
                    found += [replace(base, chunk_size=size, in_subset=False) for size in (1, 8)]
                if "steps" in layout:
                    found += [replace(base, across=True), replace(base, across=True, chunk_size=1, in_subset=False)]
            base = Case(recipe, model, chunk_size=3, in_subset=recipe == "joint")
            found += [replace(base, dropout=True), replace(base, dropout=True, checkpointing=True)]
            found.append(replace(base, layout="2 processes", dropout=True, checkpointing=True))
            found += [replace(base, chunk_size=size, checkpointing=True, in_subset=False) for size in (None, 3)]
        for layout in ("1 process", "2 processes, one without images", "4 steps"):
            vision = Case(recipe, "full", layout, train_vision=True, in_subset=recipe == "vladva")
            found += [vision, replace(vision, chunk_size=3)]
    for recipe in RECIPES:
        for model in ("full", "lora"):
            for layout in ("2 processes", "2 processes, uneven", "2 processes, one without images"):
                base = Case(recipe, model, layout, fsdp=True, in_subset=recipe == "joint" and model == "full")
                found += [replace(base, in_subset=False), replace(base, chunk_size=3)]
            steps = Case(recipe, model, "2 processes, 2 steps", fsdp=True, in_subset=recipe == "vladva")
            found += [replace(steps, in_subset=False), replace(steps, chunk_size=1, across=True)]
    return found


class FixedTeachers:
    """Teachers whose features are random but, like real ones, depend only on the content of the slice."""

    truncated = 0

    def __init__(self, args, device="cpu"):
        pass

    def modality_columns(self, triple_kernel=True):
        return slice_columns(6, 5, triple_kernel)

    def __call__(self, slices):
        vectors = []
        for part in slices:
            generator = torch.Generator().manual_seed(part.key)
            own, cross = torch.randn(11, generator=generator, dtype=torch.double).split([6, 5])
            vectors.append(torch.cat([F.normalize(own, dim=0), F.normalize(cross, dim=0)]))
        return torch.stack(vectors) if vectors else torch.zeros(0, 11, dtype=torch.double)


def rows() -> list[dict]:
    user = lambda text: [{"role": "user", "content": text}]  # noqa: E731
    return [
        {"image": make_image(0), "short_caption": "a red cat", "long_caption": "A red cat on the grass. It sleeps."},
        {
            "image": make_image(1),
            "short_caption": ["two dogs", "two windows"],
            "long_caption": "Two dogs on the grass.",
        },
        {"image": make_image(2), "short_caption": "a small yellow car"},
        {"image": make_image(3), "long_caption": "A large picture. Three people wave from the windows of a car."},
        {"anchor": "a question", "positive": "an answer", "negative": "the grass", "negative_1": "two windows"},
        {"anchor": "a car, seen from the left", "positive": ["see", make_image(4)], "negative": [make_image(1)]},
        {
            "messages": [
                *(*user("What is small?"), {"role": "assistant", "content": "A cat. A red one is small."}),
                *(*user("Is it red?"), {"role": "assistant", "content": "One is."}),
            ],
            "positive_messages": [user("a small red cat")],
        },
        {"image": make_image(5), "short_caption": "a red cat", "long_caption": "The same caption, another cat."},
    ]


def make_model(kind: str, dropout: bool):
    tiny = make_vlm("llava")
    model = UniGDForConditionalGeneration.from_vlm(tiny.model, head_type="linear", embedding_dim=12)
    processor = UniGDProcessor(tiny.processor)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.embedding_head.projection.weight, std=0.3)
    peft_config = None
    if kind == "lora":
        model.add_soft_prompts(**processor.add_soft_prompts())
        peft_config = LoraConfig(
            r=4, lora_alpha=8, lora_dropout=0.2 if dropout else 0.0, init_lora_weights=False, task_type="CAUSAL_LM"
        )
    elif dropout:
        model.vlm.config.text_config.attention_dropout = 0.2
        for layer in model.vlm.get_decoder().layers:
            layer.self_attn.attention_dropout = 0.2
    return model.double(), processor, peft_config


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        self.gradients = {
            name.removeprefix("module."): _full(parameter.grad)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }


def _full(gradient):
    if gradient is None:
        return None
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).detach().clone()


class ParityTrainer(UniGDTrainer):
    """A trainer that reads the rows of its case's layout."""

    def __init__(self, case: Case, model, args, processor, **kwargs):
        self.case = case
        self.ignores_cache = False
        super().__init__(model, args, processing_class=processor, **kwargs)

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.case.fsdp:  # accelerate enables it only with an accelerator device, but it works without one
            plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
            self.accelerator.state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = plugin
            self.is_fsdp_enabled = True

    def get_train_dataloader(self):
        parse = make_parser(self.processing_class, self.args)
        layout = LAYOUTS[self.case.layout][self.args.process_index]
        examples = [[parse(rows()[row], row) for row in step] for step in layout]
        return DataLoader(examples, batch_size=None, collate_fn=self.data_collator)

    @property
    def _uses_gradient_cache(self):
        return super()._uses_gradient_cache and not self.ignores_cache


def make_parser(processor, args):
    splitter = SentenceSplitter() if args.alignment_weight else None
    return RowParser(
        lambda text: len(processor.tokenizer(text)["input_ids"]), trust_caption_columns=True, splitter=splitter
    )


def make_args(case: Case, folder: str) -> UniGDTrainingArguments:
    return UniGDTrainingArguments(
        trust_caption_columns=True,
        output_dir=folder,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=len(LAYOUTS[case.layout][0]),
        gradient_cache_chunk_size=case.chunk_size,
        negatives_across_accumulation=case.across,
        gradient_checkpointing=case.checkpointing,
        freeze_vision_tower=not case.train_vision,
        max_steps=1,
        logging_steps=1,
        max_grad_norm=0.0,
        optim="sgd",
        learning_rate=0.0,
        loss_gradient_norm_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        ddp_backend="gloo" if case.world_size > 1 else None,
        **RECIPES[case.recipe],
    )


def train_one_step(case: Case, ignores_cache: bool = False):
    """Returns the gradients by name and the logged values."""
    AcceleratorState._reset_state()
    with tempfile.TemporaryDirectory() as folder, patch.object(trainer_module, "Teachers", FixedTeachers):
        args = make_args(case, folder)
        model, processor, peft_config = make_model(case.model, case.dropout)
        keeper = KeepGradients()
        trainer = ParityTrainer(case, model, args, processor, peft_config=peft_config, callbacks=[keeper])
        trainer.ignores_cache = ignores_cache
        torch.manual_seed(7)
        trainer.train()
    assert keeper.sharded == case.fsdp
    return keeper.gradients, trainer.state.log_history[0]


@cache
def oracle(recipe: str, kind: str, train_vision: bool, groups: tuple[tuple[int, ...], ...]):
    """Returns the gradients by name and the expected logged values, from rows that run one by one."""
    model, processor, peft_config = make_model(kind, dropout=False)
    case = Case(recipe, kind, train_vision=train_vision)
    args = make_args(case, tempfile.gettempdir())  # nothing is saved
    AcceleratorState._reset_state()
    with patch.object(trainer_module, "Teachers", FixedTeachers):
        trainer = ParityTrainer(case, model, args, processor, peft_config=peft_config)  # freezes and adapts the model
    model = trainer.model.get_base_model() if kind == "lora" else trainer.model
    parse = make_parser(processor, args)
    examples = [parse(row, place) for place, row in enumerate(rows())]
    prefixes, teachers = PrefixSampler(args.alignment_positions, args.seed), FixedTeachers(args)

    def run(sequence, target=None, prompted=True):
        """Returns the hidden states, spans, slice spans, the summed loss of the target and its number of tokens."""
        batch = processor.process_sequences(
            [sequence], [target], prompted=prompted, padding_side="right", sentence_ends=parse.splitter
        )
        spans, slice_spans, labels = (batch.pop(name, None) for name in ("spans", "slice_spans", "labels"))
        hidden = model.vlm.model(**{name: _double(value) for name, value in batch.items()}).last_hidden_state[0]
        loss, count = hidden.new_zeros(()), 0
        if labels is not None:
            count = int((labels != -100).sum())
            logits = model.vlm.lm_head(hidden)[:-1]
            loss = F.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")
        return hidden, spans[:, 1:].tolist(), slice_spans, loss, count

    def embed(hidden, start, end):
        return F.normalize(model.embedding_head.projection(hidden[start:end].mean(0)), dim=0)

    scale = model.embedding_head.logit_scale.exp().squeeze()
    losses = {"contrastive": 0.0, "alignment": 0.0, "causal_lm": 0.0}
    token_count = 0
    for group in groups:
        queries, candidates, query_keys, candidate_keys, negatives, negative_keys = [], [], [], [], [], []
        captions = {}
        positions, seen, samples = [], [], []
        for example in (examples[row] for row in group):
            is_chat = "messages" in rows()[example.row]
            texts = [rows()[example.row].get(name, []) for name in ("short_caption", "long_caption")]
            texts = [text for each in texts for text in ([each] if isinstance(each, str) else each)]
            captions.setdefault(_content(example.anchor), set()).update((text,) for text in texts)
            if example.positive is not None:
                captions[_content(example.anchor)].add(_content(example.positive))
            hidden, spans, slice_spans, loss, count = run(example.anchor, example.target, not is_chat)
            if is_chat:  # it is embedded without its answer, behind a prompt
                answered, (hidden, spans, *_) = hidden, run(example.anchor)
            losses["causal_lm"] = losses["causal_lm"] + loss
            token_count += count
            for place, turn in enumerate(example.anchor):
                if turn["role"] == "assistant":  # learned as if it were the last
                    *_, loss, count = run(example.anchor[:place], turn["content"][0]["text"], False)
                    losses["causal_lm"] = losses["causal_lm"] + loss
                    token_count += count
            if example.positive is not None:
                queries.append(embed(hidden, *spans[0]))
                query_keys.append(_content(example.anchor))
                for sequence, vectors, keys in (
                    (example.positive, candidates, candidate_keys),
                    *((negative, negatives, negative_keys) for negative in example.negatives),
                ):
                    hidden_candidate, spans_candidate, *_ = run(sequence)
                    vectors.append(embed(hidden_candidate, *spans_candidate[0]))
                    keys.append(_content(sequence))
            if args.alignment_weight:
                chosen, part = prefixes([example], slice_spans)
                compared = answered if is_chat else hidden
                positions += [embed(compared, *span) for span in chosen[:, 1:].tolist()]
                slices = [(each.modality, *teachers([each])[0].split([6, 5])) for each in part["slices"]]
                seen += [slices[:length] for length in part["lengths"].tolist()]
                samples += [example.row] * len(chosen)
        if args.contrastive_weight and queries:
            keys = candidate_keys + negative_keys
            logits = scale * torch.stack(queries) @ torch.stack(candidates + negatives).T
            for i in range(len(queries)):
                for j in range(len(keys)):
                    if i != j and keys[j] in captions[query_keys[i]]:
                        mask = torch.zeros_like(logits, dtype=torch.bool)
                        mask[i, j] = True
                        logits = logits.masked_fill(mask, -torch.inf)
            labels = torch.arange(len(queries))
            loss = F.cross_entropy(logits, labels) + F.cross_entropy(logits[:, : len(queries)].T, labels)
            losses["contrastive"] = losses["contrastive"] + loss / len(groups)
        if args.alignment_weight:
            loss = Reference(normalization=args.alignment_normalization).loss(positions, seen, samples)
            losses["alignment"] = losses["alignment"] + loss / len(groups)
    losses["causal_lm"] = losses["causal_lm"] / token_count
    weights = {name: getattr(args, f"{name}_weight") for name in losses}
    trained = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    expected_log = {}
    for name, loss in losses.items():
        if weights[name]:
            (weights[name] * loss).backward(retain_graph=True)
            norms = [parameter.grad.norm() for parameter in trained.values() if parameter.grad is not None]
            expected_log |= {f"{name}_loss": loss.item(), f"{name}_gradient_norm": torch.stack(norms).norm().item()}
            trainer.model.zero_grad()
    total = sum(weights[name] * loss for name, loss in losses.items())
    total.backward()
    expected_log["loss"] = total.item()
    return {name: parameter.grad for name, parameter in trained.items()}, expected_log


def _double(value):
    return value.double() if value.is_floating_point() else value


def _content(messages):
    parts = [part for turn in messages for part in turn["content"]]
    return tuple(part["text"] if part["type"] == "text" else part["image"].tobytes() for part in parts)


def relative_error(gradients: dict, expected: dict) -> float:
    """Returns the largest deviation of any parameter's gradient, in units of that gradient's largest entry."""
    assert gradients.keys() == expected.keys()
    overall = max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    worst = 0.0
    for name, reference in expected.items():
        gradient = gradients[name]
        reference = torch.zeros(()) if reference is None else reference
        gradient = torch.zeros_like(reference) if gradient is None else gradient
        size = max(
            float(reference.abs().max()), 1e-9 * overall
        )  # for gradients that are zero except for rounding noise
        worst = max(worst, float((gradient - reference).abs().max()) / size)
    return worst


def check(case: Case) -> dict:
    gradients, log = train_one_step(case)
    uncached = train_one_step(case, ignores_cache=True) if case.dropout else None  # on every process
    if int(os.environ.get("RANK", 0)):
        return {}
    if uncached is not None:
        expected, uncached_log = uncached
        logged = {name: value for name, value in uncached_log.items() if name.endswith(("loss", "_gradient_norm"))}
        without, _ = oracle(case.recipe, case.model, case.train_vision, tuple(map(tuple, case.groups)))
        assert relative_error(expected, without) > 1e-3, "there is no dropout"
    else:
        groups = tuple(map(tuple, case.groups))
        expected, logged = oracle(case.recipe, case.model, case.train_vision, groups)
    log_error = max(abs(log[name] - value) / abs(value) for name, value in logged.items())
    return {
        "recipe": case.recipe,
        "model": case.model,
        "how": case.name,
        "gradient_error": relative_error(gradients, expected),
        "log_error": log_error,
    }


def check_evaluation(fsdp: bool) -> dict:
    """Rows that processes cannot share evenly are evaluated once each, so the metrics are those of one process."""
    AcceleratorState._reset_state()
    case = Case("vladva", layout="2 processes", fsdp=fsdp)
    with tempfile.TemporaryDirectory() as folder:
        args = make_args(case, folder)
        args.eval_block_size = 2
        model, processor, _ = make_model("full", dropout=False)
        trainer = ParityTrainer(case, model, args, processor)
        trainer.train()
        parse = make_parser(processor, args)
        examples = [parse(row, place) for place, row in enumerate(rows()[:5])]
        metrics = trainer.evaluate(rows()[:5])
    whole, _, _ = make_model("full", dropout=False)
    (anchors, candidates), total, count = trainer.data_collator(examples)["chunks"], 0.0, 0
    with torch.no_grad():
        for example in examples:
            if example.target is not None:
                batch = processor.process_sequences([example.anchor], [example.target], padding_side="right")
                tokens = int((batch["labels"] != -100).sum())
                inputs = {name: _double(value) for name, value in batch.items() if name != "spans"}
                total, count = total + whole.vlm(**inputs).loss.item() * tokens, count + tokens
        found = whole.embed(**{name: _double(value) for name, value in anchors.items()})
        positives = whole.embed(**{name: _double(value) for name, value in candidates.items()})[: len(found)]
    ranks = (found @ positives.T).argsort(dim=1, descending=True).argsort(dim=1).diagonal()
    expected = {
        "eval_causal_lm_loss": total / count,
        "eval_anchor_to_positive_recall_at_1": (ranks == 0).double().mean().item(),
    }
    error = max(abs(metrics[name] - value) for name, value in expected.items())
    how = "evaluation, 2 processes" + (", FSDP2" if fsdp else "")
    return {"recipe": "evaluation", "model": "full", "how": how, "gradient_error": 0.0, "log_error": error}


def check_non_finite_stop() -> dict:
    """A loss that is not finite on one process stops both. The error names the process, and a checkpoint is saved."""
    AcceleratorState._reset_state()
    case = Case("vladva", layout="2 processes")
    with tempfile.TemporaryDirectory() as folder:
        args = make_args(case, folder)
        args.contrastive_weight = 0.0  # the contrastive loss would be NaN on both processes
        args.loss_gradient_norm_steps = 0
        model, processor, _ = make_model("full", dropout=False)
        trainer = ParityTrainer(case, model, args, processor)
        if args.process_index == 1:
            collate = trainer.data_collator._collate

            def poison(examples):
                batch = collate(examples)
                for chunk in batch["chunks"]:
                    if "pixel_values" in chunk:
                        chunk["pixel_values"][:] = torch.nan
                return batch

            trainer.get_train_dataloader = lambda: [poison([make_parser(processor, args)(rows()[7], 7)])]
        message = ""
        try:
            trainer.train()
        except FloatingPointError as error:
            message = str(error)
        saved = Path(args.output_dir, "checkpoint-0").exists() or args.process_index > 0
    agrees = saved and "nan on process 1, in the batch of rows [7]" in message and "process 0" not in message
    return {"recipe": "stop", "model": "full", "how": "2 processes", "gradient_error": 0.0, "log_error": 1.0 - agrees}


def run_group(world_size: int, subset: bool) -> list[dict]:
    """Runs all cases of this world size in one group of processes and returns the results."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.jsonl"
        command = [sys.executable, "-W", "ignore", __file__, "--world_size", str(world_size), "--output", str(output)]
        command += ["--subset"] if subset else []
        ranks = []
        for rank in range(world_size):
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
            folders = [
                str(Path(__file__).parents[1]),
                str(Path(__file__).parents[2]),
                os.environ.get("PYTHONPATH", ""),
            ]
            environment["PYTHONPATH"] = os.pathsep.join(folders)
            if world_size > 1:
                numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
                environment |= {name: str(number) for name, number in numbers.items()}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
            ranks.append(subprocess.Popen(command, env=environment, text=True, **pipes))
        errors = [rank.communicate()[1] for rank in ranks]
        for rank, error in zip(ranks, errors, strict=True):
            if rank.returncode:
                raise RuntimeError(error[-4000:])
        return [json.loads(line) for line in output.read_text().splitlines()]


def run_rank(world_size: int, output: Path, subset: bool) -> None:
    torch.ones(1, dtype=torch.float64).exp().log()  # see tests/conftest.py
    torch.set_num_threads(1)
    with output.open("a") as file:
        for case in cases():
            if case.world_size == world_size and (case.in_subset or not subset):
                result = check(case)
                if result:
                    file.write(json.dumps(result) + "\n")
                    file.flush()
        if world_size == 2:
            for result in (check_evaluation(fsdp=False), check_evaluation(fsdp=True), check_non_finite_stop()):
                if not is_good(result) or int(os.environ["RANK"]) == 0:
                    file.write(json.dumps(result) + "\n")


def is_good(result: dict) -> bool:
    return max(result["gradient_error"], result["log_error"]) <= TOLERANCE


def table(results: list[dict]) -> str:
    """Returns a Markdown table of the largest deviations, per way to run a step, recipe and trained model."""
    columns = [(recipe, model) for recipe in RECIPES for model in ("full", "lora")]
    by_way: dict[str, dict] = {}
    for result in results:
        if result["recipe"] not in RECIPES:
            continue
        by_way.setdefault(result["how"], {})[result["recipe"], result["model"]] = result
    lines = [
        "| | " + " | ".join(f"{recipe}, {model}" for recipe, model in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for way, found in by_way.items():
        cells = [f"{found[column]['gradient_error']:.0e}" if column in found else "" for column in columns]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


HEADER = """# The objective does not depend on how it is run

`make parity` writes this page, and `make test` runs a part of it. `UniGDTrainer` takes one step on one global batch of
eight unequal rows (captioned images, texts with hard negatives, a chat with two answers and a match, interleaved images),
in float64, in each of the ways below. Each cell is the largest deviation of any trained parameter's gradient from an oracle,
in units of that gradient's largest entry. The oracle runs every row on its own, without padding, and computes the losses in
plain torch, that of each answer as if it were the last of its chat. With dropout, the reference is the same chunks without
the cache and with the same random numbers. All deviations are below {tolerance}, and so are the relative deviations of the
logged losses and gradient norms.

`full` trains the language model and the head. `lora` trains LoRA, soft prompts and the head. Processes use gloo, with DDP
unless FSDP2 is named. "Steps" are accumulation steps. Each has its own negatives unless "negatives across steps" is named.

"""  # noqa: E501


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs every case and writes docs/parity.md.")
    parser.add_argument("--world_size", type=int)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[2] / "docs" / "parity.md")
    parser.add_argument("--subset", action="store_true")
    args = parser.parse_args()
    if args.world_size is not None:
        run_rank(args.world_size, args.output, args.subset)
        return
    results = [result for world_size in (1, 2, 4) for result in run_group(world_size, subset=False)]
    args.output.write_text(HEADER.format(tolerance=TOLERANCE) + table(results) + "\n")
    bad = [result for result in results if not is_good(result)]
    for result in bad:
        print(f"{result['recipe']}, {result['model']}, {result['how']}: {result}", file=sys.stderr)
    print(f"{len(results) - len(bad)} of {len(results)} cases agree; {args.output}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()

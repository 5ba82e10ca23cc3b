"""
Estimate the memory, the time of a step and the days of a recipe, which is read as `hf-unigd train` reads it. Of the
model, only the config is read.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated

from ..inputs import reading
from ..settings import AtLeast, NotNegative, Positive
from ..trainer import UniGDModelConfig, UniGDScriptArguments, UniGDTrainingArguments
from ..trainer.plan import CARDS, Card, Estimate, ModelShapes, Workload, estimate, find_card, plan_model
from ..trainer.plan.cards import HERE
from ..trainer.plan.estimate import SHARDINGS
from .parser import CommandParser


@dataclass
class PlanArguments:
    card: str = field(
        default="H100-80GB",
        metadata={"help": "What a device is. `cpu` is this machine, which is measured.", "choices": [*CARDS, HERE]},
    )
    devices: Positive = field(default=1, metadata={"help": "Number of devices."})
    sharding: str = field(
        default="none",
        metadata={
            "help": "What is divided among them: nothing (DDP), gradients and optimizer states (ZeRO-2), or the "
            "parameters too (FSDP).",
            "choices": list(SHARDINGS),
        },
    )
    rows: Positive | None = field(
        default=None,
        metadata={"help": "Rows of an epoch, from which the days follow unless the recipe has `max_steps`."},
    )
    images: Positive = field(default=1, metadata={"help": "Images of a row."})
    image_size: Positive | None = field(
        default=None, metadata={"help": "Side of an image in pixels. By default the vision tower's, or 448."}
    )
    image_tokens: Positive | None = field(
        default=None, metadata={"help": "Tokens of an image, where the config and `--image_size` do not give them."}
    )
    prompt_tokens: NotNegative = field(
        default=25, metadata={"help": "Tokens of the prompt and template of a sequence."}
    )
    short_tokens: NotNegative = field(default=20, metadata={"help": "Tokens of a short caption."})
    long_tokens: NotNegative = field(
        default=120, metadata={"help": "Tokens of a long caption or answer, if one is learned."}
    )
    utilization: Annotated[float, AtLeast(0, exclusive=True)] = field(
        default=0.27,
        metadata={"help": "The share of the card's peak that is reached. docs/planning.md says what was measured."},
    )

    def __post_init__(self):
        if self.sharding != "none" and self.devices == 1:
            raise ValueError("`--sharding` would have no effect on one device. Give `--devices`.")
        if self.utilization > 1:
            raise ValueError(f"`--utilization {self.utilization}` is a share, so at most 1.")

    def workload(self, shapes: ModelShapes, args: UniGDTrainingArguments) -> Workload:
        """What a device computes in a step.

        Raises:
            ValueError: nothing tells the number of tokens of an image.
        """
        size = self.image_size or shapes.image_size or 448
        patches = (size // shapes.patch_size) ** 2
        tokens = self.image_tokens or shapes.image_tokens or (patches // shapes.merged if shapes.merged else None)
        if tokens is None:
            raise ValueError(f"{shapes.name} does not say how many tokens an image has. Give `--image_tokens`.")
        rows, chunk = args.per_device_train_batch_size, args.gradient_cache_chunk_size
        if args.negatives_across_accumulation:
            chunk, rows = min(chunk or rows, rows), rows * args.gradient_accumulation_steps
        return Workload(
            rows=rows,
            chunk=chunk,
            images=self.images,
            image_tokens=tokens,
            patches=patches,
            prompt_tokens=self.prompt_tokens,
            short_tokens=self.short_tokens if args.contrastive_weight else None,
            long_tokens=self.long_tokens if args.causal_lm_weight else 0,
        )


@dataclass(frozen=True)
class Planned:
    """A recipe, and what it is estimated to take."""

    plan: PlanArguments
    args: UniGDTrainingArguments
    shapes: ModelShapes
    work: Workload
    card: Card
    found: Estimate

    @property
    def accumulated(self) -> int:
        """How often a device computes its work in an optimizer step."""
        return 1 if self.args.negatives_across_accumulation else self.args.gradient_accumulation_steps

    @property
    def seconds(self) -> float:
        """Of an optimizer step."""
        return self.found.seconds * self.accumulated

    @property
    def batch(self) -> int:
        """Rows of an optimizer step."""
        return self.work.rows * self.plan.devices * self.accumulated

    @property
    def steps(self) -> int | None:
        """Of the run; None where the recipe has no `max_steps` and the rows of an epoch are not given."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return None if self.plan.rows is None else math.ceil(self.plan.rows / self.batch * self.args.num_train_epochs)


def plan_recipe(argv: list[str]) -> Planned:
    """The plan of a command line."""
    parser = CommandParser(
        "plan", PlanArguments, UniGDScriptArguments, UniGDTrainingArguments, UniGDModelConfig, description=__doc__
    )
    parser.set_defaults(use_cpu=True)  # a plan is made on any machine
    plan, _, args, model_args = parser.parse(argv)
    with reading(model_args.model_name_or_path):
        shapes = plan_model(model_args, args)
    work, card = plan.workload(shapes, args), find_card(plan.card)
    found = estimate(shapes, work, args, card, plan.utilization, plan.devices, plan.sharding)
    return Planned(plan, args, shapes, work, card, found)


def main(argv: list[str]) -> None:
    print("\n".join(report(plan_recipe(argv))))


def report(planned: Planned) -> list[str]:
    """The lines that are printed."""
    plan, shapes, work, card, found = planned.plan, planned.shapes, planned.work, planned.card, planned.found
    chunks = f", {work.chunk} at a time" if work.chunk else ""
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in found.memory.items())
    verdict = "fits" if found.fits(card) else "does not fit"
    days = "days: give `--rows` of an epoch"
    if (steps := planned.steps) is not None:
        days = f"{steps:,} steps: {steps * planned.seconds / 86400:.1f} days"
    peak = found.flops / found.seconds / plan.utilization / 1e12
    captions = "" if work.short_tokens is None else f"a short caption of {work.short_tokens} tokens, "
    return [
        f"An estimate, not a measurement: {shapes.name} on {plan.devices} x {plan.card} (sharding: {plan.sharding})",
        f"parameters  {shapes.parameters / 1e9:.3g} billion, of which {shapes.trained / 1e6:,.1f} million are trained",
        f"a step      {planned.batch:,} rows: {work.rows} a device{chunks}, {planned.accumulated} times",
        f"memory      {found.peak / 1e9:.1f} of {card.memory / 1e9:.0f} GB a device, {verdict}: {parts}",
        f"time        {planned.seconds:.2f} s a step, {planned.batch / planned.seconds:.1f} rows a second; {days}",
        f"assumes     {plan.utilization:.0%} of the card's {peak:,.1f} TFLOP/s, no time for communication or data;",
        f"            a row has {work.images} image(s) of {work.image_tokens} tokens, {captions}{work.long_tokens} to "
        f"generate, and prompts of {work.prompt_tokens}",
    ]

"""Memory and time of a step, from shapes.

Operations are counted as in Kaplan et al., "Scaling Laws for Neural Language Models" (2020), section 2.1: two for each
number of a weight matrix and token, and those of attention. A backward pass takes as many for the gradients of the
activations, and as many again for those of the weights that are trained themselves. The activations that a layer keeps
for the backward pass are listed as in Korthikanti et al., "Reducing Activation Recomputation in Large Transformer
Models" (2022), section 4, for layers with RMS norms in float32 and fused attention.
"""

from dataclasses import dataclass

from ...modeling.modeling_unigd import MAX_LOGITS
from ..arguments import UniGDTrainingArguments
from .cards import Card
from .shapes import ModelShapes, Stack


# Of a device's memory: what the driver and the libraries take, and the share that no allocation fits into.
RESERVED_BYTES, FRAGMENTED = 1e9, 0.05
SHARDINGS = ("none", "zero2", "full")
# Numbers that an optimizer keeps for each one that is trained, and their bytes; None for as many as the parameter's.
_STATES: dict[str, tuple[float, int | None]] = {
    "8bit": (2, 1),
    "adafactor": (0, None),
    "lion": (1, None),
    "sgd": (0, None),
    "adam": (2, None),
}


@dataclass(frozen=True)
class Workload:
    """
    What a device computes in a step.

    Attributes:
        rows: Number of rows.
        chunk: Rows in a chunk of the gradient cache; None without it.
        images: Images of a row.
        image_tokens: Tokens of an image in the language model.
        patches: Patches of an image in the vision tower.
        prompt_tokens: Of the embedding prompt and the template of a sequence.
        short_tokens: Of what is searched for, beside its prompt; None if nothing is contrasted.
        long_tokens: Of what is learned to be generated.
    """

    rows: int
    chunk: int | None
    images: int
    image_tokens: int
    patches: int
    prompt_tokens: int
    short_tokens: int | None
    long_tokens: int

    @property
    def sequences(self) -> list[int]:
        """Lengths of the sequences of a row."""
        anchor = self.images * self.image_tokens + self.prompt_tokens + self.long_tokens
        return [anchor] if self.short_tokens is None else [anchor, self.prompt_tokens + self.short_tokens]


@dataclass(frozen=True)
class Estimate:
    """
    Attributes:
        memory: Bytes of a device by what they hold.
        flops: Operations of a device in a step, those of recomputed activations included.
        seconds: Of a step, at the given share of the card's peak.
        tokens: Tokens of a device in a step.
    """

    memory: dict[str, float]
    flops: float
    seconds: float
    tokens: int

    @property
    def peak(self) -> float:
        """Bytes that are taken at the same time."""
        return sum(self.memory.values())

    def fits(self, card: Card) -> bool:
        """Whether a card has the memory, and room for what no allocation fits into."""
        return self.peak <= card.memory * (1 - FRAGMENTED) - RESERVED_BYTES


def estimate(
    shapes: ModelShapes,
    work: Workload,
    args: UniGDTrainingArguments,
    card: Card,
    utilization: float,
    devices: int = 1,
    sharding: str = "none",
) -> Estimate:
    """
    Estimates a step. Communication, the loading of data, evaluations and the losses on embeddings take no time here.

    Args:
        shapes: The model.
        work: What a device computes.
        args: The training arguments.
        card: What each device is.
        utilization: The share of the card's peak that is reached.
        devices: Number of devices.
        sharding: What is divided among them: `"none"` (DDP), `"zero2"` (gradients and optimizer states), or `"full"`
            (FSDP: parameters too).

    Raises:
        ValueError: nothing is known about the memory of the optimizer.
    """
    half = args.bf16 or args.fp16 or shapes.weight_bytes < 3 * shapes.parameters
    flops, checkpointing = 0.0, int(bool(args.gradient_checkpointing))
    again = int(work.chunk is not None)
    causal = bool(args.causal_lm_weight)
    decoder = sum(_forward(shapes.text, length, 0.5) for length in work.sequences)
    logits = 2.0 * shapes.vocabulary * shapes.text.width * work.long_tokens * causal
    passes = 2 + shapes.trains_text
    flops += work.rows * (decoder * (passes + checkpointing + again) + logits * passes)
    tower = work.images * _forward(shapes.vision, work.patches, 1.0)
    flops += work.rows * tower * (3 + checkpointing + again if shapes.trains_vision else 1)
    return Estimate(
        memory=_memory(shapes, work, args, half, devices, sharding),
        flops=flops,
        seconds=flops / ((card.flops if half else card.flops_float32) * utilization),
        tokens=work.rows * sum(work.sequences),
    )


def optimizer_bytes(name: str, trained: int, trained_bytes: float) -> float:
    """
    Bytes of the states that an optimizer keeps.

    Args:
        name: `optim` of transformers.
        trained: Number of parameters.
        trained_bytes: Their bytes.

    Raises:
        ValueError: the optimizer is none of those that are known.
    """
    for part, (count, size) in _STATES.items():
        if part in name:
            return count * (trained_bytes if size is None else trained * size)
    raise ValueError(
        f"`optim={name}`: its memory is not known. Known are those with {', '.join(_STATES)} in the name."
    )


def _memory(shapes, work, args, half, devices, sharding) -> dict[str, float]:
    weights, gradients = shapes.weight_bytes, float(shapes.trained_bytes)
    states = optimizer_bytes(str(args.optim.value), shapes.trained, shapes.trained_bytes)
    if sharding == "full":
        weights += shapes.sharded_weight_bytes * (1 / devices - 1)
    if sharding != "none":
        gradients, states = gradients / devices, states / devices
    elif devices > 1:
        gradients *= 2  # DDP reduces them in buckets of their own
    size = 2 if half else 4
    together = work.rows if work.chunk is None else min(work.chunk, work.rows)
    # Without the cache both sequences of a row wait for the backward pass; a chunk holds one kind of sequence.
    tokens = together * (sum(work.sequences) if work.chunk is None else max(work.sequences))
    layer = kept_bytes(shapes.text, size, shapes.trains_text)
    if args.gradient_checkpointing:
        activations = tokens * (shapes.text.layers * shapes.text.width * size + layer)
    else:
        activations = tokens * shapes.text.layers * layer
    patches = together * work.images * work.patches
    if not shapes.trains_vision:  # a layer at a time, before the language model runs
        activations = max(activations, patches * size * (4 * shapes.vision.width + 2 * shapes.vision.inner))
    else:
        layer = kept_bytes(shapes.vision, size, True)
        kept = shapes.vision.layers * shapes.vision.width * size + layer
        activations += patches * (kept if args.gradient_checkpointing else shapes.vision.layers * layer)
    labelled = together * work.long_tokens * bool(args.causal_lm_weight) * shapes.vocabulary
    memory = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": states,
        "activations": float(activations),
        # The logits as they come, in float32, and their gradient.
        "logits": min(labelled, MAX_LOGITS) * (size + 8.0),
        "pixels": 4.0 * 3 * work.rows * work.images * work.patches * shapes.patch_size**2,
    }
    if not shapes.trains_vision:
        memory["image features"] = float(work.rows * work.images * work.image_tokens * shapes.text.width * size)
    if half and shapes.trains_text and shapes.trained_bytes > 2 * shapes.trained:
        memory["weights in 16 bits"] = 2.0 * shapes.trained  # which autocast keeps until the step ends
    return memory


def kept_bytes(stack: Stack, size: int, is_trained: bool) -> int:
    """
    Bytes that a layer keeps of a token for its backward pass.

    Args:
        stack: The layers.
        size: Bytes of a number in the activations.
        is_trained: Whether the weights are trained themselves, so that the inputs of their products are kept.
    """
    queries, keys = stack.attention
    norms = 2 * 4 * stack.width  # in float32
    attention = 2 * queries + 2 * keys  # queries, keys, values and the output
    mlp = 3 * stack.inner if stack.gated else stack.inner  # what the activation and the gate are multiplied with
    inputs = 2 * stack.width + stack.inner if is_trained else 0  # the output of attention is among the above
    return norms + size * (attention + mlp + inputs + stack.adapted // stack.layers)


def _forward(stack: Stack, length: int, attended: float) -> float:
    """Operations of a forward pass of a sequence of which each token attends to a share of the others."""
    return 2.0 * stack.matrices * length + 4.0 * attended * length**2 * stack.attention[0] * stack.layers

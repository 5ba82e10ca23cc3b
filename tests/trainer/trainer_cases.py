"""Rows and trainers for tiny models, and a reference implementation of the structure loss."""

import math

from datasets import Dataset
from peft import LoraConfig

from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from hf_unigd.trainer import UniGDTrainer, UniGDTrainingArguments
from tiny_models import make_image, make_vlm


COLOURS = ("red", "green", "blue", "yellow")
LORA = LoraConfig(r=4, lora_alpha=4, task_type="CAUSAL_LM")


def make_rows(n=16, **columns):
    return Dataset.from_dict(
        {
            "image": [make_image(place) for place in range(n)],
            "short_caption": [f"a {COLOURS[place % 4]} cat {place}" for place in range(n)],
            "long_caption": [f"A {COLOURS[place % 4]} cat on the grass, seen {place} times." for place in range(n)],
            **columns,
        }
    )


def make_args(folder, **kwargs):
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "trust_caption_columns": True,
        "loss_gradient_norm_steps": 0,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return UniGDTrainingArguments(output_dir=str(folder), **{**defaults, **kwargs})


def make_model(**kwargs):
    tiny = make_vlm()
    return UniGDForConditionalGeneration.from_vlm(tiny.model, **kwargs), UniGDProcessor(tiny.processor)


def make_trainer(
    folder,
    rows=None,
    family="llava",
    peft_config=None,
    soft_prompts=False,
    eval_rows=None,
    trainer_kwargs=None,
    **kwargs,
):
    tiny = make_vlm(family)
    model, processor = UniGDForConditionalGeneration.from_vlm(tiny.model), UniGDProcessor(tiny.processor)
    if soft_prompts:
        model.add_soft_prompts(**processor.add_soft_prompts())
    rows = make_rows() if rows is None else rows
    return UniGDTrainer(
        model,
        make_args(folder, **kwargs),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        peft_config=peft_config,
        **(trainer_kwargs or {}),
    )


def stream(rows=24, shards=4):
    columns = {"anchor": [f"question {n}" for n in range(rows)], "positive": [f"answer {n}" for n in range(rows)]}
    return Dataset.from_dict(columns).to_iterable_dataset(num_shards=shards)


def alignments(n, m):
    """Yields every alignment of n with m slices: the paths from (0, 0) to (n-1, m-1) by steps right, down or both."""
    if (n, m) == (1, 1):
        yield [(0, 0)]
        return
    for dn, dm in ((1, 0), (0, 1), (1, 1)):
        if n > dn and m > dm:
            for path in alignments(n - dn, m - dm):
                yield [*path, (n - 1, m - 1)]


class Reference:
    """Equations 2 to 4 of the paper for sequences of (modality, own vector, cross vector), in Python's float64."""

    def __init__(self, delta=1.0, normalization="cosine", one_slice="cosine", target="kernel", triple=True):
        self.delta, self.normalization, self.one_slice = delta, normalization, one_slice
        self.target_kind, self.triple = target, triple

    def parts(self, a, b):
        return (1, 1) if self.triple and a[0] == b[0] else (2, 2)

    def cosine(self, a, b):
        i, j = self.parts(a, b)
        return float(a[i] @ b[j])

    def kernel(self, x, y, constant=False):
        """Returns the sum over all alignments (equation 2). If `constant`, all slices are alike."""
        sigma = self.delta * math.sqrt((len(x) + len(y)) / 2)
        total = 0.0
        for path in alignments(len(x), len(y)):
            product = 1.0
            for i, j in path:
                if not constant:
                    phi = (2 - 2 * self.cosine(x[i], y[j])) / (2 * sigma**2)
                    product *= math.exp(-(phi + math.log(2 - math.exp(-phi))))
            total += product
        return total

    def target(self, x, y):
        if self.target_kind == "mean_slice":
            return sum(self.cosine(a, b) for a in x for b in y) / (len(x) * len(y))
        if len(x) == len(y) == 1 and self.one_slice == "cosine":
            return self.cosine(x[0], y[0])
        value = self.kernel(x, y) / math.sqrt(self.kernel(x, x) * self.kernel(y, y))
        if self.normalization == "content":
            count = [self.kernel(a, b, constant=True) for a, b in ((x, y), (x, x), (y, y))]
            value /= count[0] / math.sqrt(count[1] * count[2])
        return min(value, 1.0)

    def loss(self, embeddings, prefixes, samples):
        n = len(prefixes)
        total = 0.0
        for i in range(n):
            for j in range(n):
                target = 1.0 if samples[i] == samples[j] else self.target(prefixes[i], prefixes[j])
                total = total + (embeddings[i] @ embeddings[j] - target) ** 2
        return total / n

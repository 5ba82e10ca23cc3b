"""How far each lever of the quickstart goes, over five seeds: `python benchmarks/quickstart_levers.py [NAMES]`.

On a GPU, hundreds of runs fit into minutes, if they share kernels. So this is the quickstart's model once more in
plain torch, with a leading dimension of seeds in each parameter: a CLIP tower, a projector and a Llama of the same
sizes, the same initial distributions, the symmetric contrastive loss and the next-token loss, and a step that is
recorded as a CUDA graph. The icons that `load_icons` holds out for tests are not used at all: of the others, 1,000 new
combinations of known words are held out for validation, and the rest are trained on.

Settings are compared at equal work: the steps of each are as many as make 25 TFLOP, those of 650 steps with AdamW and
the paper's prompts ("adamw"). The script writes benchmarks/results/quickstart_levers.json after each setting; those
that it has are not run again.
"""

import argparse
import json
import math
import random
import time
from collections import Counter
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from seeded_llava import DEVICE, SEEDS, VOCABULARY, Model, Setting

from hf_unigd.data.icons import (
    COLOURS,
    SIZES,
    _held_out,
    glyph_mask,
    icon_glyphs,
    long_caption,
    named_words,
    short_caption,
)
from hf_unigd.quickstart.muon import orthogonalize
from hf_unigd.quickstart.small_llava import build_processor


RESULTS = Path(__file__).parent / "results" / "quickstart_levers.json"
HELD_OUT = 1000
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


SHORT = {"tokens_before": 1, "tokens_after": 1}
MUON = {**SHORT, "optimizer": "muon"}
QUARTER = {**MUON, "causal_lm_rows": 0.25}
LEVERS: dict[str, dict] = {
    "adamw": {},
    "short prompt": SHORT,
    "short prompt, no next-token loss": {**SHORT, "causal_lm_weight": 0.0},
    "short prompt, next-token on a quarter of the rows": {**SHORT, "causal_lm_rows": 0.25},
    "short prompt, inverse temperature 50": {**SHORT, "inverse_temperature": 49.4},
    "short prompt, patches of 8": {**SHORT, "patch_size": 8},
    "short prompt, 24 pixels, patches of 4": {**SHORT, "image_size": 24, "patch_size": 4},
    "short prompt, convolutional stem": {**SHORT, "stem": "conv"},
    "short prompt, convolutional stem, patches of 8": {**SHORT, "stem": "conv", "patch_size": 8},
    "short prompt, linear head": {**SHORT, "head": "linear"},
    "muon": MUON,
    "muon, rate 0.002": {**MUON, "matrix_lr": 2e-3},
    "muon, no next-token loss": {**MUON, "causal_lm_weight": 0.0},
    "muon, quarter": QUARTER,
    "muon, quarter, weight decay 0.2": {**QUARTER, "weight_decay": 0.2},
    "muon, quarter, label smoothing 0.1": {**QUARTER, "label_smoothing": 0.1},
    "muon, quarter, jitter 0.1": {**QUARTER, "jitter": 0.1},
    "muon, quarter, words in any order": {**QUARTER, "shuffle_words": True},
    "muon, quarter, groups of 8": {**QUARTER, "group_size": 8},
    "muon, quarter, rate 0.008": {**QUARTER, "matrix_lr": 8e-3},
    "muon, quarter, rate 0.016": {**QUARTER, "matrix_lr": 16e-3},
    "muon, quarter, patches of 8": {**QUARTER, "patch_size": 8},
    "muon, quarter, 24 pixels, patches of 4": {**QUARTER, "image_size": 24, "patch_size": 4},
    "muon, quarter, width 192": {**QUARTER, "hidden_size": 192},
    "muon, quarter, 6 layers in the tower": {**QUARTER, "vision_layers": 6},
    "muon, quarter, 1 layer of text": {**QUARTER, "text_layers": 1},
    "muon, quarter, 3 layers of text": {**QUARTER, "text_layers": 3},
}


@dataclass
class Icons:
    """Everything about the icons as tensors; icons are rows."""

    names: list[str]
    masks: dict[tuple[int, int], torch.Tensor]  # by side and size: (icons, side, side) uint8
    short: torch.Tensor  # (icons, tokens), 0 for padding
    long: torch.Tensor  # (icons, colours, sizes, tokens)
    shuffled: torch.Tensor  # (icons, 8, tokens): the words of the short caption in other orders
    words: np.ndarray  # (icons, words), 0 for padding
    train: torch.Tensor
    held_out: torch.Tensor
    vocabulary: list[str]


def padded(rows: list[list[int]]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


@cache
def load() -> Icons:
    glyphs = icon_glyphs()
    test = _held_out(tuple(glyphs))
    names = sorted(set(glyphs) - test)
    left = Counter(word for name in names for word in set(name.split("_")))
    shuffled = random.Random(1).sample(names, len(names))
    held_out: set[str] = set()
    for name in shuffled:  # as `load_icons` chooses its test icons
        words = set(name.split("_"))
        if len(held_out) < HELD_OUT and len(words) > 1 and all(left[word] > 10 for word in words):
            held_out.add(name)
            left.subtract(words)
    colours, sizes = list(COLOURS), list(SIZES)
    captions = [short_caption(name) for name in names]
    captions += [long_caption(name, colours[n % 8], sizes[n // 8 % 2]) for n, name in enumerate(names)]
    tokenizer = build_processor(captions, vocab_size=VOCABULARY).tokenizer

    def encode(text: str) -> list[int]:
        return tokenizer(f" {text}", add_special_tokens=False)["input_ids"]

    draw = random.Random(0)
    orders = [
        [encode(" ".join(draw.sample(name.split("_"), len(name.split("_"))))) for _ in range(8)] for name in names
    ]
    longs = [[*encode(long_caption(n, c, s)), tokenizer.eos_token_id] for n in names for c in colours for s in sizes]
    ids = {word: place + 1 for place, word in enumerate(sorted({word for name in names for word in name.split("_")}))}
    masks = {
        (side, place): torch.stack(
            [torch.from_numpy(np.array(glyph_mask(glyphs[name], round(side * SIZES[size]), side))) for name in names]
        ).to(DEVICE)
        for side in (24, 48)
        for place, size in enumerate(sizes)
    }
    is_held_out = torch.tensor([name in held_out for name in names])
    return Icons(
        names,
        masks,
        padded([encode(short_caption(name)) for name in names]).to(DEVICE),
        padded(longs).reshape(len(names), len(colours), len(sizes), -1).to(DEVICE),
        padded([order for each in orders for order in each]).reshape(len(names), 8, -1).to(DEVICE),
        padded([[ids[word] for word in name.split("_")] for name in names]).numpy(),
        (~is_held_out).nonzero().flatten().to(DEVICE),
        is_held_out.nonzero().flatten().to(DEVICE),
        tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))),
    )


def draw(setting: Setting, icons: torch.Tensor, views: torch.Tensor, training: bool) -> torch.Tensor:
    """Pixels `(seeds, rows, 3, side, side)`; a view is a colour and a size."""
    masks = [load().masks[setting.image_size, size][icons] for size in (0, 1)]
    mask = torch.where((views // 8 == 1)[..., None, None], masks[1], masks[0]).float() / 255
    if training and setting.jitter:
        count, side = icons.numel(), setting.image_size
        scale = 1 + setting.jitter * (2 * torch.rand(count, device=DEVICE) - 1)
        shift = setting.jitter * (2 * torch.rand(count, 2, device=DEVICE) - 1)
        zero = torch.zeros_like(scale)
        affine = torch.stack([scale, zero, shift[:, 0], zero, scale, shift[:, 1]], 1).reshape(count, 2, 3)
        grid = F.affine_grid(affine, [count, 1, side, side], align_corners=False)
        mask = F.grid_sample(mask.reshape(count, 1, side, side), grid, align_corners=False).reshape(mask.shape)
    return (1 - mask[..., None, :, :] * (1 - RGB[views % 8][..., None, None]) - MEAN) / STD


RGB = torch.tensor(
    [[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in COLOURS.values()], device=DEVICE
)
MEAN, STD = (torch.tensor(each, device=DEVICE).view(3, 1, 1) for each in (CLIP_MEAN, CLIP_STD))


class Run:
    """Trains all seeds of a setting. `step` has static shapes and reads its data by a counter, for a CUDA graph."""

    def __init__(self, setting: Setting):
        self.setting, self.model = setting, Model(setting)
        parameters, kinds = self.model.parameters, self.model.kinds
        self.hidden = [name for name, kind in kinds.items() if kind == "hidden" and setting.optimizer == "muon"]
        others = [name for name in parameters if name not in self.hidden]
        groups = [
            {"params": [parameters[name] for name in others if kinds[name] != "plain"]},
            {"params": [parameters[name] for name in others if kinds[name] == "plain"], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [{**group, "lr": torch.tensor(setting.lr, device=DEVICE)} for group in groups],
            betas=(0.9, 0.98),
            weight_decay=setting.weight_decay,
            fused=DEVICE == "cuda",
            capturable=DEVICE == "cuda",
        )
        self.momenta = {name: torch.zeros_like(parameters[name]) for name in self.hidden}
        self.icons, self.views = self._schedule()
        warmup, steps = setting.warmup_steps, setting.steps
        self.rates = torch.tensor(
            [
                min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / (steps - warmup)))
                for step in range(steps)
            ],
            device=DEVICE,
        )
        self.count = torch.zeros(1, dtype=torch.long, device=DEVICE)
        self.losses = torch.zeros(steps, SEEDS, device=DEVICE)
        self.labels = torch.arange(setting.batch_size, device=DEVICE).repeat(SEEDS)
        self.other = ~torch.eye(setting.batch_size, dtype=torch.bool, device=DEVICE)

    def _schedule(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Icons and views of each step `(steps, seeds, rows)`, of twelve fixed views of each icon."""
        setting, icons = self.setting, load()
        count, needed = len(icons.train), setting.steps * setting.batch_size
        words = icons.words[icons.train.cpu().numpy()]
        rows, views = [], []
        for seed in range(SEEDS):
            generator = np.random.default_rng(77 + seed)
            fixed = generator.integers(0, 16, (12, count))
            own_rows, own_views = [], []
            while sum(map(len, own_rows)) < needed:
                if setting.group_size:
                    word = words[np.arange(count), (generator.random(count) * (words > 0).sum(1)).astype(int)]
                    order = np.lexsort((generator.random(count), generator.permutation(20000)[word]))
                    groups = order[: count // setting.group_size * setting.group_size].reshape(-1, setting.group_size)
                    order = groups[generator.permutation(len(groups))].reshape(-1)
                    view = generator.integers(0, 12, len(order))
                else:
                    view, order = np.divmod(generator.permutation(12 * count), count)
                own_rows.append(order)
                own_views.append(fixed[view, order])
            rows.append(np.concatenate(own_rows)[:needed].reshape(setting.steps, -1))
            views.append(np.concatenate(own_views)[:needed].reshape(setting.steps, -1))
        places = torch.from_numpy(np.stack(rows, 1)).to(DEVICE)
        return icons.train[places], torch.from_numpy(np.stack(views, 1)).to(DEVICE)

    def step(self) -> None:
        setting, model, data = self.setting, self.model, load()
        icons, views, rate = self.icons[self.count][0], self.views[self.count][0], self.rates[self.count][0]
        features = model.see(draw(setting, icons, views, training=True))
        captioned = round(setting.batch_size * setting.causal_lm_rows) if setting.causal_lm_weight else 0
        causal_lm, images = torch.zeros(SEEDS, device=DEVICE), []
        if captioned:
            first = slice(None), slice(captioned)
            caption = data.long[icons[first], views[first] % 8, views[first] // 8]
            causal_lm, hidden = self._next_token(features[first], caption)
            images.append(model.embedding(hidden))
        if captioned < setting.batch_size:
            images.append(model.embed_images(features[:, captioned:]))
        short = data.short[icons]
        if setting.shuffle_words:
            short = data.shuffled[icons, torch.randint(0, 8, icons.shape, device=DEVICE)]
        similarity = torch.cat(images, 1) @ model.embed_texts(short).mT
        logits = similarity * model.parameters["scale"].exp()[:, None, None]
        logits = logits.masked_fill((icons[:, :, None] == icons[:, None]) & self.other, -1e4)
        contrastive = torch.zeros(SEEDS, device=DEVICE)
        for each in (logits, logits.mT):
            losses = F.cross_entropy(
                each.flatten(0, 1), self.labels, reduction="none", label_smoothing=setting.label_smoothing
            )
            contrastive = contrastive + losses.view(SEEDS, -1).mean(1)
        loss = (contrastive + setting.causal_lm_weight * causal_lm).sum()
        parameters = model.parameters
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        with torch.no_grad():
            self._update(dict(zip(parameters, gradients, strict=True)), rate)
            self.losses.index_copy_(0, self.count, contrastive.detach()[None])
            self.count += 1

    def _next_token(self, features: torch.Tensor, caption: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each seed, and the hidden state of the token that is embedded."""
        x, place = self.model.image_sequence(features, caption)
        hidden = self.model.read(x)
        logits = self.model.linear("output", hidden[:, :, place:-1])
        losses = F.cross_entropy(logits.flatten(0, 2), caption.flatten(), reduction="none", ignore_index=0)
        loss = losses.view(SEEDS, -1).sum(1) / (caption > 0).flatten(1).sum(1)
        return loss, hidden[:, :, place]

    def _update(self, gradients: dict[str, torch.Tensor | None], rate: torch.Tensor) -> None:
        setting, parameters = self.setting, self.model.parameters
        found = [torch.zeros_like(parameters[n]) if g is None else g for n, g in gradients.items()]
        norm = torch.stack(torch._foreach_norm(found)).norm() / SEEDS**0.5  # clipped for all seeds alike
        found = torch._foreach_mul(found, (1 / (norm + 1e-6)).clamp(max=1))
        for name, gradient in zip(parameters, found, strict=True):
            parameters[name].grad = gradient
        for group in self.optimizer.param_groups:
            group["lr"].copy_(setting.lr * rate)
        self.optimizer.step()
        for shape in {parameters[name].shape for name in self.hidden}:
            names = [name for name in self.hidden if parameters[name].shape == shape]
            momenta = [self.momenta[name] for name in names]
            own = [parameters[name].grad for name in names]
            torch._foreach_lerp_(momenta, own, 0.05)
            updates = orthogonalize(torch.stack(torch._foreach_lerp(own, momenta, 0.95)).flatten(0, 1))
            updates = updates.unflatten(0, (len(names), SEEDS)) * (
                setting.matrix_lr * rate * 0.2 * max(shape[1:]) ** 0.5
            )
            matrices = [parameters[name] for name in names]
            torch._foreach_mul_(matrices, 1 - setting.matrix_lr * rate * setting.weight_decay)
            torch._foreach_sub_(matrices, list(updates))
        parameters["scale"].clamp_(max=math.log(100))

    def train(self) -> None:
        if DEVICE == "cpu":
            for _ in range(self.setting.steps):
                self.step()
            return
        start = {name: value.detach().clone() for name, value in self.model.parameters.items()}
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.step()
        with torch.no_grad():  # back to the start, in place
            for name, value in self.model.parameters.items():
                value.copy_(start[name])
            states = [value for state in self.optimizer.state.values() for value in state.values()]
            for value in (*states, *self.momenta.values(), self.count):
                value.zero_()
        for _ in range(self.setting.steps):
            graph.replay()
        torch.cuda.synchronize()

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Recall in per cent, and what captions name, of each seed on the held-out icons."""
        setting, model, data = self.setting, self.model, load()
        views = torch.randint(0, 16, (len(data.held_out),), generator=torch.Generator().manual_seed(5)).to(DEVICE)
        icons = data.held_out.expand(SEEDS, -1)
        features = model.see(draw(setting, icons, views.expand(SEEDS, -1), training=False))
        similarity = model.embed_images(features) @ model.embed_texts(data.short[icons]).mT
        found: dict[str, Any] = {}
        for name, each in (("image_to_text", similarity), ("text_to_image", similarity.mT)):
            rank = (each > each.diagonal(dim1=1, dim2=2)[..., None]).sum(-1)
            for k in (1, 10):
                found[f"{name}_recall_at_{k}"] = [round(100 * v, 1) for v in (rank < k).float().mean(1).tolist()]
        every = max(1, setting.steps // 10)
        found["contrastive_loss"] = [[round(v, 2) for v in row] for row in self.losses[every - 1 :: every].tolist()]
        return found | (self._captions(features) if setting.causal_lm_weight else {})

    def _captions(self, features: torch.Tensor) -> dict[str, list[float]]:
        data, tokens = load(), torch.zeros(*features.shape[:2], 0, dtype=torch.long, device=DEVICE)
        for _ in range(data.long.shape[-1]):
            hidden = self.model.read(self.model.image_sequence(features, tokens)[0])[:, :, -1:]
            tokens = torch.cat([tokens, self.model.linear("output", hidden).argmax(-1)], 2)
        names = [data.names[place].split("_") for place in data.held_out.tolist()]
        scores: dict[str, list[float]] = {"all_words": [], "first_word": [], "a_word": []}
        for rows in tokens.tolist():
            said = [self._named(row) for row in rows]
            hits = {
                "all_words": [sorted(a) == sorted(b) for a, b in zip(said, names, strict=True)],
                "first_word": [a[:1] == b[:1] for a, b in zip(said, names, strict=True)],
                "a_word": [bool(set(a) & set(b)) for a, b in zip(said, names, strict=True)],
            }
            for name, values in hits.items():
                scores[name].append(round(100 * sum(values) / len(values), 1))
        return {f"captions_with_{name}": values for name, values in scores.items()}

    @staticmethod
    def _named(row: list[int]) -> list[str]:
        """The words that a caption names."""
        end = row.index(2) if 2 in row else len(row)
        text = "".join(load().vocabulary[token] if token < VOCABULARY else "?" for token in row[:end])
        return named_words(text.replace("Ġ", " ").strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"any of: {'; '.join(LEVERS)}")
    parser.add_argument("--tflop", type=float, default=25.0, help="work of each setting")
    args = parser.parse_args()
    if unknown := set(args.names) - set(LEVERS):
        parser.error(f"unknown settings: {', '.join(sorted(unknown))}")
    torch.backends.cuda.matmul.allow_tf32 = True
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in args.names or LEVERS:
        if name in results:
            continue
        setting = Setting(**LEVERS[name], tflop=args.tflop)
        run, start = Run(setting), time.perf_counter()
        run.train()
        changed = {f.name: getattr(setting, f.name) for f in fields(Setting) if getattr(setting, f.name) != f.default}
        results[name] = {
            "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
            "torch": torch.__version__,
            "settings": changed,
            "steps": setting.steps,
            "seconds": round(time.perf_counter() - start, 1),
            **run.evaluate(),
        }
        print(f"{name}: {json.dumps(results[name])}", flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

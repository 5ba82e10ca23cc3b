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

from hf_unigd.data.icons import COLOURS, SIZES, _glyph_mask, _held_out, icon_glyphs, long_caption, short_caption
from hf_unigd.quickstart.muon import orthogonalize
from hf_unigd.quickstart.small_llava import build_processor


RESULTS = Path(__file__).parent / "results" / "quickstart_levers.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS, HEAD_SIZE, MLP = 5, 32, 3
VOCABULARY, PROMPT_TOKENS, HELD_OUT = 2000, 64, 1000
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass
class Setting:
    tflop: float = 25.0
    batch_size: int = 128
    optimizer: str = "adamw"  # or muon
    lr: float = 2e-3
    matrix_lr: float = 4e-3
    weight_decay: float = 0.05
    warmup_steps: int = 20
    inverse_temperature: float = 1 / 0.07
    label_smoothing: float = 0.0  # of the contrastive loss
    causal_lm_weight: float = 0.5
    causal_lm_rows: float = 1.0  # share of the rows of a batch that have a long caption
    tokens_before: int = 2  # of the template
    tokens_after: int = 10  # of the prompt and the template
    image_size: int = 48
    patch_size: int = 12
    stem: str = "patch"  # or conv: convolutions of 3 x 3
    hidden_size: int = 128
    vision_layers: int = 4
    text_layers: int = 2
    head: str = "none"  # or linear
    jitter: float = 0.0  # random shifts and scales of the images, as a share of their side
    group_size: int = 0  # a batch consists of groups of icons that share a word
    shuffle_words: bool = False

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def flops(self) -> float:
        """Floating-point operations of a step."""
        width = self.hidden_size
        vision, text = (4 + 2 * MLP) * width**2, (4 + 3 * MLP) * width**2 * self.text_layers
        image = (self.patches + 1) * self.vision_layers * vision + self.patches * 3 * self.patch_size**2 * width
        image += 2 * self.patches * width**2 + 2 * self.vision_layers * self.patches**2 * width
        if self.stem == "conv":
            image += 9 * (24**2 * 3 * 32 + 12**2 * 32 * 64 + self.patches * 64 * width)
        prompt = self.tokens_before + self.tokens_after
        captions = (29 * text + 16 * VOCABULARY * width) * self.causal_lm_rows if self.causal_lm_weight else 0
        return 6 * self.batch_size * (image + (2 * prompt + self.patches + 9) * text + captions)

    @property
    def steps(self) -> int:
        return int(self.tflop * 1e12 / self.flops)


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
            [torch.from_numpy(np.array(_glyph_mask(glyphs[name], round(side * SIZES[size]), side))) for name in names]
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


class Model:
    """A LLaVA whose parameters have a leading dimension of seeds. `kinds` are hidden, decayed, or plain."""

    def __init__(self, setting: Setting):
        self.setting, width = setting, setting.hidden_size
        self.parameters: dict[str, torch.Tensor] = {}
        self.kinds: dict[str, str] = {}
        self._generators = [torch.Generator().manual_seed(1000 + seed) for seed in range(SEEDS)]
        self._channels = [3, 32, 64, width]
        if setting.stem == "conv":
            for layer, (inner, outer) in enumerate(zip(self._channels, self._channels[1:], strict=False)):
                self._add(f"conv{layer}", (outer, inner, 3, 3), (2 / (9 * inner)) ** 0.5)
                self._norm(f"conv{layer}.norm")
        else:
            self._linear("patch", 3 * setting.patch_size**2, width, 0.02, bias=False, kind="decayed")
        self._add("class", (width,), width**-0.5, "plain")
        self._add("position", (setting.patches + 1, width), 0.02)
        self._norm("first")
        small = width**-0.5 * (2 * setting.vision_layers) ** -0.5
        for layer in range(setting.vision_layers):
            for name in ("q", "k", "v", "o"):
                self._linear(f"vision{layer}.{name}", width, width, width**-0.5 if name == "o" else small)
            self._linear(f"vision{layer}.up", width, MLP * width, (2 * width) ** -0.5)
            self._linear(f"vision{layer}.down", MLP * width, width, small)
            self._norm(f"vision{layer}.norm1")
            self._norm(f"vision{layer}.norm2")
        scale = width**-0.5
        self._linear("project1", width, width, scale)
        self._linear("project2", width, width, scale)
        for layer in range(setting.text_layers):
            for name in ("q", "k", "v", "o"):
                self._linear(f"text{layer}.{name}", width, width, scale, bias=False)
            for name, sizes in (("gate", (1, MLP)), ("up", (1, MLP)), ("down", (MLP, 1))):
                self._linear(f"text{layer}.{name}", sizes[0] * width, sizes[1] * width, scale, bias=False)
            self._norm(f"text{layer}.norm1", bias=False)
            self._norm(f"text{layer}.norm2", bias=False)
        self._norm("last", bias=False)
        self._add("embedding", (VOCABULARY + PROMPT_TOKENS, width), scale)
        self._linear("output", width, VOCABULARY + PROMPT_TOKENS, scale, bias=False, kind="decayed")
        if setting.head == "linear":
            self._linear("head", width, width, scale)
        self.parameters["scale"] = torch.full((SEEDS,), math.log(setting.inverse_temperature), device=DEVICE)
        self.kinds["scale"] = "plain"
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        angles = torch.arange(96, device=DEVICE)[:, None] * 10000.0 ** (
            -torch.arange(0, HEAD_SIZE, 2, device=DEVICE) / HEAD_SIZE
        )
        angles = torch.cat([angles, angles], 1)
        self._cosine, self._sine = angles.cos(), angles.sin()
        self._prompt = torch.arange(VOCABULARY, VOCABULARY + PROMPT_TOKENS, device=DEVICE)

    def _add(self, name: str, shape: tuple[int, ...], std: float, kind: str = "decayed") -> None:
        drawn = [std * torch.randn(*shape, generator=generator) for generator in self._generators]
        self.parameters[name], self.kinds[name] = torch.stack(drawn).to(DEVICE), kind

    def _constant(self, name: str, size: int, value: float) -> None:
        self.parameters[name], self.kinds[name] = torch.full((SEEDS, size), value, device=DEVICE), "plain"

    def _norm(self, name: str, bias: bool = True) -> None:
        size = self._channels[int(name[4]) + 1] if name.startswith("conv") else self.setting.hidden_size
        self._constant(name, size, 1.0)
        if bias:
            self._constant(f"{name}.bias", size, 0.0)

    def _linear(self, name: str, inputs: int, outputs: int, std: float, bias: bool = True, kind: str = "hidden"):
        self._add(name, (inputs, outputs), std, kind)
        if bias:
            self._constant(f"{name}.bias", outputs, 0.0)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.parameters[name], self.parameters.get(f"{name}.bias")
        flat = x.flatten(1, -2)
        y = torch.bmm(flat, weight) if bias is None else torch.baddbmm(bias[:, None], flat, weight)
        return y.reshape(*x.shape[:-1], weight.shape[-1])

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.parameters[name], self.parameters.get(f"{name}.bias")
        shape = (SEEDS, *[1] * (x.dim() - 2), -1)
        if bias is None:
            return F.rms_norm(x, x.shape[-1:], eps=1e-6) * weight.view(shape)
        return F.layer_norm(x, x.shape[-1:], eps=1e-5) * weight.view(shape) + bias.view(shape)

    def attend(self, name: str, x: torch.Tensor, causal: bool) -> torch.Tensor:
        _, rows, length, width = x.shape
        q, k, v = (
            self.linear(f"{name}.{part}", x)
            .reshape(SEEDS * rows, length, width // HEAD_SIZE, HEAD_SIZE)
            .transpose(1, 2)
            for part in "qkv"
        )
        if causal:
            q, k = (self._rotate(each) for each in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.linear(f"{name}.o", y.transpose(1, 2).reshape(x.shape))

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        length, half = x.shape[2], HEAD_SIZE // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * self._cosine[:length] + turned * self._sine[:length]

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """Image tokens `(seeds, rows, patches, width)` of `(seeds, rows, 3, side, side)`."""
        setting, rows = self.setting, pixels.shape[1]
        side, patch = setting.image_size // setting.patch_size, setting.patch_size
        if setting.stem == "conv":
            x = self._convolve(pixels)
        else:
            x = pixels.reshape(SEEDS, rows, 3, side, patch, side, patch).permute(0, 1, 3, 5, 2, 4, 6)
            x = self.linear("patch", x.reshape(SEEDS, rows, side * side, -1))
        first = self.parameters["class"][:, None, None].expand(SEEDS, rows, 1, -1)
        x = self.norm("first", torch.cat([first, x], 2) + self.parameters["position"][:, None])
        for layer in range(setting.vision_layers):
            x = x + self.attend(f"vision{layer}", self.norm(f"vision{layer}.norm1", x), causal=False)
            y = self.linear(f"vision{layer}.up", self.norm(f"vision{layer}.norm2", x))
            x = x + self.linear(f"vision{layer}.down", y * torch.sigmoid(1.702 * y))
        return self.linear("project2", F.gelu(self.linear("project1", x[:, :, 1:])))

    def _convolve(self, pixels: torch.Tensor) -> torch.Tensor:
        rows, left = pixels.shape[1], self.setting.patch_size
        x = pixels.transpose(0, 1).flatten(1, 2)
        for layer in range(3):
            weight = self.parameters[f"conv{layer}"]
            stride = left if layer == 2 else 2
            x = F.conv2d(x, weight.flatten(0, 1), stride=stride, padding=1, groups=SEEDS)
            left //= stride
            y = self.norm(f"conv{layer}.norm", x.unflatten(1, (SEEDS, -1)).permute(1, 0, 3, 4, 2))
            x = F.gelu(y).permute(1, 0, 4, 2, 3).flatten(1, 2)
        return y.reshape(SEEDS, rows, -1, self.setting.hidden_size)

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        table = self.parameters["embedding"]
        offsets = table.shape[1] * torch.arange(SEEDS, device=DEVICE).view(-1, *[1] * (ids.dim() - 1))
        return F.embedding(ids + offsets, table.flatten(0, 1))

    def read(self, x: torch.Tensor) -> torch.Tensor:
        for layer in range(self.setting.text_layers):
            x = x + self.attend(f"text{layer}", self.norm(f"text{layer}.norm1", x), causal=True)
            y = self.norm(f"text{layer}.norm2", x)
            y = F.silu(self.linear(f"text{layer}.gate", y)) * self.linear(f"text{layer}.up", y)
            x = x + self.linear(f"text{layer}.down", y)
        return self.norm("last", x)

    def image_sequence(self, features: torch.Tensor, caption: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
        """Inputs of the decoder, and the place of the token that is embedded."""
        before, after = self.setting.tokens_before, self.setting.tokens_after
        template = self.look_up(self._prompt.expand(SEEDS, features.shape[1], -1))
        parts = [template[:, :, :before], features, template[:, :, 8 : 8 + after]]
        if caption is not None:
            parts.append(self.look_up(caption))
        return torch.cat(parts, 2), before + features.shape[2] + after - 1

    def embed_images(self, features: torch.Tensor) -> torch.Tensor:
        x, place = self.image_sequence(features)
        return self.embedding(self.read(x)[:, :, place])

    def embed_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        before, after = self.setting.tokens_before, self.setting.tokens_after
        counts = (tokens > 0).sum(-1, keepdim=True)
        ids = F.pad(tokens, (before, after))
        ids[..., :before] = self._prompt[:before]
        # The prompts of images and texts share all tokens but one.
        prompt = torch.cat([self._prompt[24:25], self._prompt[9 : 8 + after]])
        places = before + counts + torch.arange(after, device=DEVICE)
        ids.scatter_(2, places, prompt.expand(*places.shape[:2], -1))
        last = places[..., -1:, None].expand(-1, -1, 1, self.setting.hidden_size)
        return self.embedding(self.read(self.look_up(ids)).gather(2, last)[:, :, 0])

    def embedding(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.linear("head", hidden) if self.setting.head == "linear" else hidden, dim=-1)


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
        text = text.replace("Ġ", " ").strip().removeprefix("An icon of ").split(", drawn in")[0]
        return text.replace(" and ", " ").replace(",", "").split()


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

"""The quickstart's model in plain torch, with a leading dimension of seeds in each parameter."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS, HEAD_SIZE, MLP = 5, 32, 3
VOCABULARY, PROMPT_TOKENS = 2000, 64


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

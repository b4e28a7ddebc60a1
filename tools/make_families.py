"""Export the small graphs of tests/families: one of each model family, as PyTorch's exporters write them.

The weights are random (seeded) and the layers narrow; the structure is that of the networks the families
are named after. Half of them leave through the exporter that traces TorchScript (opsets 13 and 17: most
models in the wild), half through the one over torch.export (opset 18 and up). Nothing is simplified.

Needs the `tools` extra: pip install "trtq[tools]".
"""

from __future__ import annotations

import argparse
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

from trtq import files

VOCABULARY = 64


# --- convolutional networks -------------------------------------------------------------------------------


class SqueezeExcite(nn.Module):
    """Channel gates from the global average, as in MobileNetV3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, channels // 4, 1)
        self.expand = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * functional.hardsigmoid(self.expand(functional.relu(self.reduce(self.pool(x)))))


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


class MobileBlock(nn.Module):
    """Inverted residual with squeeze-and-excitation and hard swish."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * 4
        self.body = nn.Sequential(
            conv_bn(inputs, hidden, 1),
            nn.Hardswish(),
            conv_bn(hidden, hidden, 5, stride, groups=hidden),
            nn.Hardswish(),
            SqueezeExcite(hidden),
            conv_bn(hidden, outputs, 1),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class Classifier(nn.Module):
    """MobileNetV3's blocks, then ResNeXt's grouped bottleneck with a projected shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 16, 3, 2), nn.Hardswish())
        self.mobile = nn.Sequential(MobileBlock(16, 16, 1), MobileBlock(16, 24, 2))
        self.grouped = nn.Sequential(
            conv_bn(24, 32, 1), nn.ReLU(), conv_bn(32, 32, 3, 2, groups=4), nn.ReLU(), conv_bn(32, 48, 1)
        )
        self.shortcut = conv_bn(24, 48, 1, 2)
        self.head = nn.Sequential(nn.Linear(48, 32), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(32, 10))

    def forward(self, image: Tensor) -> Tensor:
        x = self.mobile(self.stem(image))
        x = functional.relu(self.grouped(x) + self.shortcut(x))
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class SplitBlock(nn.Module):
    """YOLO's C2f: a split whose one half runs through bottlenecks, every stage concatenated."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.half = outputs // 2
        self.enter = nn.Sequential(conv_bn(inputs, outputs, 1), nn.SiLU())
        self.bottleneck = nn.Sequential(
            conv_bn(self.half, self.half), nn.SiLU(), conv_bn(self.half, self.half), nn.SiLU()
        )
        self.leave = nn.Sequential(conv_bn(3 * self.half, outputs, 1), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        parts.append(parts[-1] + self.bottleneck(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class PoolPyramid(nn.Module):
    """YOLO's SPPF: max pools in a row, all concatenated."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(conv_bn(channels, channels // 2, 1), nn.SiLU())
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.leave = nn.Sequential(conv_bn(2 * channels, channels, 1), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        stages = [self.enter(x)]
        for _ in range(3):
            stages.append(self.pool(stages[-1]))
        return self.leave(torch.cat(stages, 1))


class YoloDetector(nn.Module):
    """Two levels, box sides as the mean of a distribution over bins (YOLOv8's DFL), one output tensor."""

    bins = 8
    classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 8, 3, 2), nn.SiLU(), conv_bn(8, 16, 3, 2), nn.SiLU())
        self.fine = SplitBlock(16, 16)
        self.down = nn.Sequential(conv_bn(16, 24, 3, 2), nn.SiLU())
        self.coarse = nn.Sequential(SplitBlock(24, 24), PoolPyramid(24))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.merge = SplitBlock(40, 16)
        self.boxes = nn.ModuleList(self.branch(c, 4 * self.bins) for c in (16, 24))
        self.scores = nn.ModuleList(self.branch(c, self.classes) for c in (16, 24))
        self.mean = nn.Conv2d(self.bins, 1, 1, bias=False)
        self.mean.weight.data = torch.arange(self.bins, dtype=torch.float32).reshape(1, -1, 1, 1)

    @staticmethod
    def branch(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(conv_bn(inputs, 16), nn.SiLU(), nn.Conv2d(16, outputs, 1))

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(self.stem(images))
        coarse = self.coarse(self.down(fine))
        levels = self.merge(torch.cat([self.up(coarse), fine], 1)), coarse
        n = images.shape[0]
        rows, anchors, strides = [], [], []
        for level, box, score, stride in zip(levels, self.boxes, self.scores, (4.0, 8.0), strict=True):
            rows.append(torch.cat([box(level), score(level)], 1).reshape(n, 4 * self.bins + self.classes, -1))
            height, width = level.shape[2:]
            y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
            anchors.append(torch.stack([x, y]).reshape(2, -1))
            strides.append(torch.full((1, height * width), stride))
        boxes, scores = torch.cat(rows, 2).split((4 * self.bins, self.classes), 1)
        chances = boxes.reshape(n, 4, self.bins, -1).transpose(2, 1).softmax(1)
        low, high = self.mean(chances).reshape(n, 4, -1).chunk(2, 1)
        centre, scale = torch.cat(anchors, 1)[None], torch.cat(strides, 1)[None]
        low, high = centre - low, centre + high
        return torch.cat([torch.cat([(low + high) / 2, high - low], 1) * scale, scores.sigmoid()], 1)


class UNet(nn.Module):
    """Encoder, transposed convolutions and skips back up, bilinear to the input's size."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(conv_bn(3, 8), nn.ReLU(), conv_bn(8, 8), nn.ReLU())
        self.second = nn.Sequential(nn.MaxPool2d(2), conv_bn(8, 16), nn.LeakyReLU(0.1))
        self.third = nn.Sequential(nn.MaxPool2d(2), conv_bn(16, 32), nn.ReLU())
        self.dilated = nn.Conv2d(32, 32, 3, padding=2, dilation=2)
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.up_bn = nn.BatchNorm2d(16)
        self.decode = nn.Sequential(conv_bn(32, 16), nn.ReLU())
        self.classes = nn.Conv2d(16, 5, 1)

    def forward(self, image: Tensor) -> Tensor:
        first = self.first(image)
        second = self.second(first)
        third = functional.relu(self.dilated(self.third(second)))
        x = functional.relu(self.up_bn(self.up(third)))
        x = self.classes(self.decode(torch.cat([x, second], 1)))
        return functional.interpolate(x, size=image.shape[2:], mode="bilinear", align_corners=False)


class SuperResolution(nn.Module):
    """Residual blocks with PReLU, pixel shuffle, and a bicubic skip past everything."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 16, 3), nn.PReLU(16))
        self.body = nn.Sequential(conv_bn(16, 16), nn.PReLU(16), conv_bn(16, 16))
        self.leave = nn.Conv2d(16, 12, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.enter(image)
        x = functional.pixel_shuffle(self.leave(x + self.body(x)), 2)
        return (x + functional.interpolate(image, scale_factor=2.0, mode="bilinear")).clamp(0, 1)


class Video(nn.Module):
    """R(2+1)D: convolutions over space, then over time."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(3, 12, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False),
            nn.BatchNorm3d(12),
            nn.ReLU(),
            nn.Conv3d(12, 16, (3, 1, 1), padding=(1, 0, 0), bias=False),
            nn.BatchNorm3d(16),
            nn.ReLU(),
            nn.MaxPool3d((1, 2, 2)),
            nn.Conv3d(16, 24, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
            nn.Linear(24, 6),
        )

    def forward(self, clip: Tensor) -> Tensor:
        return self.body(clip)


# --- transformers -----------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention with separate projections and additive mask, written out as in older models."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), x.size(1), self.heads, -1).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) / query.size(-1) ** 0.5
        if mask is not None:
            scores = scores + mask
        mixed = (scores.softmax(-1) @ value).permute(0, 2, 1, 3).contiguous()
        return self.out(mixed.view(x.size(0), x.size(1), -1))


class Bert(nn.Module):
    """Post-norm encoder over token ids with a padding mask; pooled to a classifier."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(64, width)
        self.register_buffer("position_ids", torch.arange(64)[None])
        self.norm = nn.LayerNorm(width, 1e-12)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attention": Attention(width, 4),
                    "norm": nn.LayerNorm(width, 1e-12),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                    "norm2": nn.LayerNorm(width, 1e-12),
                }
            )
            for _ in range(2)
        )
        self.pooler, self.classifier = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        positions = self.positions(self.position_ids[:, : input_ids.size(1)])
        x = self.norm(self.tokens(input_ids) + positions)
        for layer in self.layers:
            x = layer["norm"](x + layer["attention"](x, mask))
            x = layer["norm2"](x + layer["down"](functional.gelu(layer["up"](x))))
        return self.classifier(self.pooler(x[:, 0]).tanh())


class VisionTransformer(nn.Module):
    """Patch convolution, class token, pre-norm `nn.TransformerEncoder`."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 65, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.encoder(x))[:, 0])


class SwinBlock(nn.Module):
    """Attention within windows of 4 x 4, shifted by half a window in every second block."""

    window = 4

    def __init__(self, width: int, side: int, shift: int) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.heads, self.side, self.shift = 2, side, shift
        area = self.window**2
        self.bias_table = nn.Parameter(torch.randn((2 * self.window - 1) ** 2, self.heads))
        points = torch.cartesian_prod(torch.arange(self.window), torch.arange(self.window))
        apart = points[:, None] - points[None] + self.window - 1
        self.register_buffer("bias_index", (apart[..., 0] * (2 * self.window - 1) + apart[..., 1]).flatten())
        region = torch.zeros(1, side, side, 1)
        parts = (slice(0, -self.window), slice(-self.window, -shift or None), slice(-shift or side, None))
        for number, (rows, columns) in enumerate((r, c) for r in parts for c in parts):
            region[:, rows, columns] = number
        numbers = self.divide(region).view(-1, area)
        mask = (numbers[:, None] - numbers[:, :, None]).ne(0).float() * -100.0
        self.register_buffer("mask", mask if shift else None)

    def divide(self, x: Tensor) -> Tensor:
        """(N, side, side, C) -> (N * windows, 16, C)."""
        count, size = self.side // self.window, self.window
        x = x.view(-1, count, size, count, size, x.shape[-1])
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size * size, x.shape[-1])

    def attention(self, x: Tensor) -> Tensor:
        windows, area, width = x.shape
        qkv = self.qkv(x).reshape(windows, area, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0] * (width // self.heads) ** -0.5, qkv[1], qkv[2]
        bias = self.bias_table[self.bias_index].view(area, area, self.heads).permute(2, 0, 1)
        scores = query @ key.transpose(-2, -1) + bias[None]
        if self.mask is not None:
            count = self.mask.shape[0]
            scores = scores.view(-1, count, self.heads, area, area) + self.mask[None, :, None]
            scores = scores.view(-1, self.heads, area, area)
        return self.out((scores.softmax(-1) @ value).transpose(1, 2).reshape(windows, area, width))

    def forward(self, x: Tensor) -> Tensor:
        n, area, width = x.shape
        count, size = self.side // self.window, self.window
        y = self.norm(x).view(n, self.side, self.side, width)
        y = torch.roll(y, (-self.shift, -self.shift), (1, 2)) if self.shift else y
        y = self.attention(self.divide(y)).view(-1, count, count, size, size, width)
        y = y.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, self.side, self.side, width)
        y = torch.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y
        x = x + y.view(n, area, width)
        return x + self.mlp(self.norm2(x))


class Swin(nn.Module):
    """Two stages with patch merging between them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.norm = nn.LayerNorm(width)
        self.stage = nn.Sequential(SwinBlock(width, 8, 0), SwinBlock(width, 8, 2))
        self.merge_norm = nn.LayerNorm(4 * width)
        self.merge = nn.Linear(4 * width, 2 * width, bias=False)
        self.last = SwinBlock(2 * width, 4, 0)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stage(self.norm(self.patches(image).flatten(2).transpose(1, 2)))
        x = x.view(x.shape[0], 8, 8, -1)
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1).view(x.shape[0], 16, -1)
        return self.head(self.last(self.merge(self.merge_norm(x))).mean(1))


class RootMeanSquareNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class DecoderLayer(nn.Module):
    """Llama's: rotary positions, two key/value heads for four queries, gated feed-forward."""

    def __init__(self, width: int, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.heads, self.groups, self.depth = heads, groups, width // heads
        self.norm, self.norm2 = RootMeanSquareNorm(width), RootMeanSquareNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(width, groups * self.depth, bias=False) for _ in range(2))
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def rotate(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        low, high = x[..., : self.depth // 2], x[..., self.depth // 2 :]
        return x * cosine + torch.cat([-high, low], -1) * sine

    def forward(self, x: Tensor, mask: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        n, length, _ = x.shape
        y = self.norm(x)
        query = self.query(y).view(n, length, self.heads, self.depth).transpose(1, 2)
        key = self.key(y).view(n, length, self.groups, self.depth).transpose(1, 2)
        value = self.value(y).view(n, length, self.groups, self.depth).transpose(1, 2)
        query, key = self.rotate(query, cosine, sine), self.rotate(key, cosine, sine)
        repeats = self.heads // self.groups
        key, value = (
            t[:, :, None]
            .expand(n, self.groups, repeats, length, self.depth)
            .reshape(n, -1, length, self.depth)
            for t in (key, value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, -1))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """A causal language model over token ids with left or right padding; tied embedding as last layer."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(DecoderLayer(width) for _ in range(2))
        self.norm = RootMeanSquareNorm(width)
        self.register_buffer("frequencies", 1e4 ** (-torch.arange(0, width // 4, 2) / (width // 4)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        length = input_ids.shape[1]
        steps = torch.arange(length)
        angles = torch.cat([steps[:, None] * self.frequencies] * 2, -1)
        causal = steps[None, :] <= steps[:, None]
        seen = causal[None, None] & attention_mask[:, None, None, :].bool()
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        x = self.tokens(input_ids)
        for layer in self.layers:
            x = layer(x, mask, angles.cos(), angles.sin())
        return functional.linear(self.norm(x), self.tokens.weight)


class CachedDecoder(nn.Module):
    """A language model's step: new tokens, the keys and values of the past, and those of now for the next."""

    def __init__(self, width: int = 32, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.heads, self.groups, self.depth = heads, groups, width // heads
        self.tokens, self.norm, self.norm2 = (
            nn.Embedding(VOCABULARY, width),
            nn.RMSNorm(width),
            nn.RMSNorm(width),
        )
        self.query, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.key, self.value = (nn.Linear(width, groups * self.depth, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down, self.head = (
            nn.Linear(2 * width, width, bias=False),
            nn.Linear(width, VOCABULARY, bias=False),
        )
        self.register_buffer("frequencies", 1e4 ** (-torch.arange(0, self.depth, 2) / self.depth))

    def rotate(self, x: Tensor, first: int) -> Tensor:
        angles = (torch.arange(x.shape[2]) + first)[:, None] * self.frequencies
        low, high = x.chunk(2, -1)
        cosine, sine = angles.cos(), angles.sin()
        return torch.cat([low * cosine - high * sine, high * cosine + low * sine], -1)

    def forward(
        self, input_ids: Tensor, past_key: Tensor, past_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, past = self.tokens(input_ids), past_key.shape[2]
        y = self.norm(x)
        query = self.query(y).unflatten(2, (self.heads, -1)).transpose(1, 2)
        key, value = (
            layer(y).unflatten(2, (self.groups, -1)).transpose(1, 2) for layer in (self.key, self.value)
        )
        key = torch.cat([past_key, self.rotate(key, past)], 2)
        value = torch.cat([past_value, value], 2)
        seen = torch.arange(key.shape[2])[None] <= torch.arange(past, key.shape[2])[:, None]
        mixed = functional.scaled_dot_product_attention(
            self.rotate(query, past), key, value, attn_mask=seen, enable_gqa=True
        )
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        x = x + self.down(functional.silu(self.gate(y)) * self.up(y))
        return self.head(x), key, value


class Products(nn.Module):
    """Einsum attention, a product of a matrix with a batch, and experts: one weight matrix each."""

    def __init__(self, width: int = 16, experts: int = 4) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.mix = nn.Parameter(torch.randn(12, 12) / 4)
        self.experts = nn.Parameter(torch.randn(experts, width, width) / 4)
        self.gate = nn.Linear(width, experts)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.einsum("nqd,nkd->nqk", self.query(x), self.key(x)).softmax(-1)
        x = x + torch.einsum("nqk,nkd->nqd", scores, self.value(x))
        x = x + torch.matmul(self.mix, x)
        each = torch.matmul(x[:, None], self.experts)
        weights = self.gate(x).softmax(-1).permute(0, 2, 1)[..., None]
        return self.head((each * weights).sum(1).mean(1))


# --- pictures from pictures, text and clicks ---------------------------------------------------------------


class DepthFusion(nn.Module):
    """DPT's: a residual unit on what comes in from the side, and twice the size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.side, self.unit = (
            nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), conv_bn(width, width))
            for _ in range(2)
        )

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        x = x + side + self.side(side)
        x = x + self.unit(x)
        return functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)


class Depth(nn.Module):
    """Monocular depth: tokens of two levels of a transformer, reassembled to maps and fused."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.levels = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 3, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.reassemble = nn.ModuleList([nn.Conv2d(width, 16, 1), nn.Conv2d(width, 16, 3, 2, 1)])
        self.fusions = nn.ModuleList(DepthFusion(16) for _ in range(2))
        self.head = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1), nn.ReLU())

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        fine, coarse = (
            reassemble((x := level(x)).transpose(1, 2).reshape(-1, x.shape[2], 8, 8))
            for level, reassemble in zip(self.levels, self.reassemble, strict=True)
        )
        x = self.fusions[0](coarse, coarse)
        return self.head(self.fusions[1](x, fine))[:, 0]


class TimedBlock(nn.Module):
    """A diffusion model's residual block: GroupNorm, SiLU, and the time step added to every position."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(4, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(time, outputs))
        self.second = nn.Sequential(
            nn.GroupNorm(4, outputs), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.skip(x) + self.second(self.first(x) + self.time(time)[:, :, None, None])


class CrossAttention(nn.Module):
    """Attention of a map to itself and to a text, and a gated feed-forward (GEGLU)."""

    def __init__(self, width: int, text: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.queries = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.keys, self.values = (
            nn.ModuleList(nn.Linear(size, width, bias=False) for size in (width, text)) for _ in range(2)
        )
        self.outs = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        x = image.flatten(2).transpose(1, 2)
        for i in range(2):
            y = self.norms[i](x)
            source = text if i else y
            parts = (self.queries[i](y), self.keys[i](source), self.values[i](source))
            mixed = functional.scaled_dot_product_attention(*map(self.split, parts))
            x = x + self.outs[i](mixed.transpose(1, 2).flatten(2))
        value, gate = self.up(self.norms[2](x)).chunk(2, -1)
        x = x + self.down(value * functional.gelu(gate))
        return image + x.transpose(1, 2).unflatten(2, image.shape[2:])


class Diffusion(nn.Module):
    """A latent diffusion U-Net: noise from a latent, a time step and a text."""

    def __init__(self, width: int = 16, text: int = 12) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width))
        self.register_buffer("frequencies", 1e4 ** (-torch.arange(0, width // 2) / (width // 2)))
        self.enter, self.leave = nn.Conv2d(4, width, 3, padding=1), nn.Conv2d(width, 4, 3, padding=1)
        self.first, self.down = TimedBlock(width, width, 2 * width), nn.Conv2d(width, width, 3, 2, 1)
        self.middle = TimedBlock(width, 2 * width, 2 * width)
        self.attention = CrossAttention(2 * width, text)
        self.up = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.last = TimedBlock(3 * width, width, 2 * width)
        self.norm = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU())

    def forward(self, latent: Tensor, step: Tensor, text: Tensor) -> Tensor:
        angles = step * self.frequencies
        time = self.time(torch.cat([angles.cos(), angles.sin()], -1))
        skip = self.first(self.enter(latent), time)
        x = self.attention(self.middle(self.down(skip), time), text)
        x = self.up(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.leave(self.norm(self.last(torch.cat([x, skip], 1), time)))


class Segmenter(nn.Module):
    """SAM's decoder: clicks as Fourier features, attention both ways, a mask for each mask token."""

    def __init__(self, width: int = 16, tokens: int = 3) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(2, width // 2))
        self.kinds = nn.Parameter(torch.randn(2, width))
        self.tokens = nn.Parameter(torch.randn(1, tokens + 1, width))
        self.positions = nn.Parameter(torch.randn(1, 64, width))
        self.inner, self.to_image, self.to_tokens = (
            nn.MultiheadAttention(width, 2, batch_first=True) for _ in range(3)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.enlarge = nn.Sequential(nn.ConvTranspose2d(width, 8, 2, 2), nn.GELU())
        self.masks = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 8))
        self.quality = nn.Linear(width, tokens)

    def forward(self, embedding: Tensor, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        angles = 2 * torch.pi * (points @ self.frequencies)
        clicks = torch.cat([angles.sin(), angles.cos()], -1) + labels[..., None] * self.kinds[0]
        x = torch.cat([self.tokens.expand(points.shape[0], -1, -1), clicks + self.kinds[1]], 1)
        image = embedding.flatten(2).transpose(1, 2) + self.positions
        x = self.norms[0](x + self.inner(x, x, x, need_weights=False)[0])
        x = self.norms[1](x + self.to_image(x, image, image, need_weights=False)[0])
        x = self.norms[2](x + self.feed(x))
        image = self.norms[3](image + self.to_tokens(image, x, x, need_weights=False)[0])
        large = self.enlarge(image.transpose(1, 2).unflatten(2, embedding.shape[2:]))
        masks = self.masks(x[:, 1:4]) @ large.flatten(2)
        return masks.unflatten(2, large.shape[2:]), self.quality(x[:, 0])


# --- speech and sequences ---------------------------------------------------------------------------------


class ConformerBlock(nn.Module):
    """Half a feed-forward, attention, gated depthwise convolution, the other half."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.after = (
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
            )
            for _ in range(2)
        )
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.convolution_norm = nn.LayerNorm(width)
        self.convolution = nn.Sequential(
            nn.Conv1d(width, 2 * width, 1),
            nn.GLU(dim=1),
            nn.Conv1d(width, width, 7, padding=3, groups=width, bias=False),
            nn.BatchNorm1d(width),
            nn.SiLU(),
            nn.Conv1d(width, width, 1),
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.before(x)
        y = self.attention_norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.convolution(self.convolution_norm(x).transpose(1, 2)).transpose(1, 2)
        return self.norm(x + 0.5 * self.after(x))


class Conformer(nn.Module):
    """Speech features subsampled by convolutions, two blocks, log-probabilities per step."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.subsample = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU())
        self.enter = nn.Linear(8 * 4, width)
        self.blocks = nn.Sequential(ConformerBlock(width), ConformerBlock(width))
        self.leave = nn.Linear(width, 12)

    def forward(self, features: Tensor) -> Tensor:
        x = self.subsample(features[:, None]).transpose(1, 2).flatten(2)
        return self.leave(self.blocks(self.enter(x))).log_softmax(-1)


class Wav2Vec(nn.Module):
    """Strided convolutions over the waveform, GroupNorm after the first, positional grouped convolution."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.extract = nn.Sequential(
            nn.Conv1d(1, 16, 10, 5, bias=False),
            nn.GroupNorm(16, 16),
            nn.GELU(),
            nn.Conv1d(16, 16, 3, 2, bias=False),
            nn.GELU(),
            nn.Conv1d(16, 16, 2, 2, bias=False),
            nn.GELU(),
        )
        self.project = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, width))
        self.position = nn.utils.parametrizations.weight_norm(
            nn.Conv1d(width, width, 8, padding=4, groups=4), dim=2
        )
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, 4)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.leave = nn.Linear(width, 12)

    def forward(self, waveform: Tensor) -> Tensor:
        x = self.project(self.extract(waveform[:, None]).transpose(1, 2))
        x = x + functional.gelu(self.position(x.transpose(1, 2))[:, :, :-1]).transpose(1, 2)
        x = x + self.attention(self.norm(x))
        return self.leave(x + self.feed(x))


class TextLine(nn.Module):
    """CRNN: convolutions over a line of text, a bidirectional LSTM over its columns."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(1, 8), nn.ReLU(), nn.MaxPool2d(2), conv_bn(8, 16), nn.ReLU(), nn.MaxPool2d((4, 1))
        )
        self.recurrent = nn.LSTM(32, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 12)

    def forward(self, line: Tensor) -> Tensor:
        x = self.body(line).flatten(1, 2).permute(0, 2, 1)
        return self.head(self.recurrent(x)[0])


class Keyword(nn.Module):
    """Convolution over speech features, a GRU, the last state classified."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(16, 24, 5, 2, 2)
        self.recurrent = nn.GRU(24, 16, batch_first=True)
        self.head = nn.Linear(16, 6)

    def forward(self, features: Tensor) -> Tensor:
        x = functional.relu(self.convolution(features)).transpose(1, 2)
        return self.head(self.recurrent(x)[1][-1])


class Speaker(nn.Module):
    """Text to speech: a text encoder whose states an alignment spreads over the frames, then mel bands."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.attention, self.norm, self.norm2 = Attention(width, 2), nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed = nn.Sequential(
            nn.Conv1d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.Conv1d(2 * width, width, 3, padding=1)
        )
        self.pitch = nn.Sequential(nn.Conv1d(width, width, 3, padding=1), nn.ReLU(), nn.Conv1d(width, 1, 1))
        self.from_pitch = nn.Conv1d(1, width, 3, padding=1)
        self.decode = nn.Sequential(
            nn.Conv1d(width, width, 5, padding=2), nn.BatchNorm1d(width), nn.Tanh(), nn.Conv1d(width, 16, 1)
        )

    def forward(self, input_ids: Tensor, alignment: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        x = self.norm(x + self.attention(x))
        x = self.norm2(x + self.feed(x.transpose(1, 2)).transpose(1, 2)).transpose(1, 2)
        x = x + self.from_pitch(self.pitch(x))
        return self.decode(x @ alignment)


class Vocoder(nn.Module):
    """HiFi-GAN's generator: transposed convolutions, and the mean of dilated residual blocks after each."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.enter = nn.Conv1d(16, width, 7, padding=3)
        self.ups = nn.ModuleList(nn.ConvTranspose1d(width >> i, width >> i + 1, 8, 4, 2) for i in range(2))
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                nn.Conv1d(width >> i + 1, width >> i + 1, kernel, padding=kernel // 2 * rate, dilation=rate)
                for kernel, rate in ((3, 1), (3, 3), (5, 2))
            )
            for i in range(2)
        )
        self.leave = nn.Conv1d(width >> 2, 1, 7, padding=3)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.enter(mel)
        for up, blocks in zip(self.ups, self.blocks, strict=True):
            x = up(functional.leaky_relu(x, 0.1))
            x = sum(x + block(functional.leaky_relu(x, 0.1)) for block in blocks) / len(blocks)
        return self.leave(functional.leaky_relu(x)).tanh()


class Transducer(nn.Module):
    """RNN-T: an LSTM over the tokens so far, joined with every frame of the encoder."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.predictor = nn.LSTM(width, width, batch_first=True)
        self.frames, self.labels = nn.Linear(20, 32), nn.Linear(width, 32)
        self.joiner = nn.Linear(32, 12)

    def forward(self, encoded: Tensor, input_ids: Tensor) -> Tensor:
        labels = self.labels(self.predictor(self.tokens(input_ids))[0])
        joined = self.frames(encoded)[:, :, None] + labels[:, None]
        return self.joiner(joined.tanh()).log_softmax(-1)


# --- export -----------------------------------------------------------------------------------------------

Axes = Mapping[int, str]


@dataclass(frozen=True)
class Family:
    """A network and how it leaves PyTorch.

    Attributes:
        inputs: name -> shape of an example; a name of token ids or of a mask makes it int64.
        dynamic: the axes that stay open, the same for all inputs.
        modern: the exporter over torch.export, else the one that traces TorchScript.
    """

    network: Callable[[], nn.Module]
    inputs: Mapping[str, tuple[int, ...]]
    opset: int
    dynamic: Axes = field(default_factory=dict)
    modern: bool = False
    outputs: tuple[str, ...] = ("output",)


BATCH: Axes = {0: "batch"}
SEQUENCE: Axes = {0: "batch", 1: "length"}

CACHED = {"input_ids": (2, 4), "past_key": (2, 2, 6, 8), "past_value": (2, 2, 6, 8)}
PRESENT = ("logits", "present_key", "present_value")
DENOISED = {"latent": (2, 4, 8, 8), "step": (2, 1), "text": (2, 6, 12)}

FAMILIES = {
    "classifier": Family(Classifier, {"image": (2, 3, 32, 32)}, 13, BATCH),
    "yolo": Family(YoloDetector, {"images": (1, 3, 32, 32)}, 17),
    "yolo_modern": Family(YoloDetector, {"images": (2, 3, 32, 32)}, 20, BATCH, modern=True),
    "unet": Family(UNet, {"image": (2, 3, 32, 32)}, 13, {0: "batch", 2: "height", 3: "width"}),
    "unet_modern": Family(UNet, {"image": (4, 3, 32, 32)}, 18, modern=True),
    "super_resolution": Family(SuperResolution, {"image": (2, 3, 16, 16)}, 17, BATCH),
    "video": Family(Video, {"clip": (2, 3, 4, 16, 16)}, 20, BATCH, modern=True),
    "bert": Family(Bert, {"input_ids": (2, 12), "attention_mask": (2, 12)}, 13, SEQUENCE),
    "bert_modern": Family(Bert, {"input_ids": (2, 12), "attention_mask": (2, 12)}, 20, SEQUENCE, modern=True),
    "vit": Family(VisionTransformer, {"image": (2, 3, 32, 32)}, 20, BATCH, modern=True),
    "vit_static": Family(VisionTransformer, {"image": (1, 3, 32, 32)}, 17),
    "swin": Family(Swin, {"image": (2, 3, 32, 32)}, 17, BATCH),
    "swin_modern": Family(Swin, {"image": (2, 3, 32, 32)}, 18, BATCH, modern=True),
    "decoder": Family(Decoder, {"input_ids": (2, 12), "attention_mask": (2, 12)}, 17, SEQUENCE),
    "decoder_modern": Family(
        Decoder, {"input_ids": (2, 12), "attention_mask": (2, 12)}, 20, SEQUENCE, modern=True
    ),
    "products": Family(Products, {"x": (2, 12, 16)}, 17, BATCH),
    "cached_decoder": Family(CachedDecoder, CACHED, 20, BATCH, modern=True, outputs=PRESENT),
    "cached_decoder_attention": Family(CachedDecoder, CACHED, 23, BATCH, modern=True, outputs=PRESENT),
    "depth": Family(Depth, {"image": (2, 3, 32, 32)}, 20, BATCH, modern=True),
    "diffusion": Family(Diffusion, DENOISED, 17, BATCH),
    "diffusion_attention": Family(Diffusion, DENOISED, 23, BATCH, modern=True),
    "segmenter": Family(
        Segmenter,
        {"embedding": (2, 16, 8, 8), "points": (2, 3, 2), "labels": (2, 3)},
        20,
        BATCH,
        modern=True,
        outputs=("masks", "quality"),
    ),
    "conformer": Family(Conformer, {"features": (2, 48, 19)}, 17, SEQUENCE),
    "conformer_modern": Family(Conformer, {"features": (2, 48, 19)}, 18, BATCH, modern=True),
    "wav2vec": Family(Wav2Vec, {"waveform": (2, 400)}, 13, SEQUENCE),
    "speaker": Family(Speaker, {"input_ids": (2, 12), "alignment": (2, 12, 24)}, 17, BATCH),
    "vocoder": Family(Vocoder, {"mel": (2, 16, 12)}, 17, BATCH),
    "transducer": Family(Transducer, {"encoded": (2, 10, 20), "input_ids": (2, 5)}, 17, BATCH),
    "text_line": Family(TextLine, {"line": (2, 1, 16, 40)}, 17, BATCH),
    "keyword": Family(Keyword, {"features": (2, 16, 40)}, 13, BATCH),
    "keyword_modern": Family(Keyword, {"features": (1, 16, 40)}, 20, modern=True),
}


def example(name: str, shape: tuple[int, ...]) -> Tensor:
    if name == "input_ids":
        return torch.randint(VOCABULARY, shape)
    return torch.ones(shape, dtype=torch.int64) if name == "attention_mask" else torch.randn(shape)


def spread(network: nn.Module) -> nn.Module:
    """Normalization layers that do not start as the identity, so that folding them changes something."""
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.2, 2.0)
        if isinstance(getattr(module, "weight", None), Tensor) and "Norm" in type(module).__name__:
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network.eval()


def export(family: Family) -> bytes:
    """The family's network, seeded, as ONNX."""
    torch.manual_seed(0)
    network = spread(family.network())
    inputs = tuple(example(name, shape) for name, shape in family.inputs.items())
    axes = {name: dict(family.dynamic) for name in family.inputs} if family.dynamic else None
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracing exporter being the older one
        program = torch.onnx.export(
            network,
            inputs,
            None if family.modern else buffer,
            dynamo=family.modern,
            opset_version=family.opset,
            input_names=list(family.inputs),
            output_names=list(family.outputs),
            dynamic_shapes=axes if family.modern else None,
            dynamic_axes=None if family.modern else axes,
            verbose=False,
        )
    model = onnx.load_model_from_string(buffer.getvalue()) if program is None else program.model_proto
    onnx.checker.check_model(model)
    return without_traces(model).SerializeToString()


def without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without the stack traces of PyTorch's that name files of this machine."""
    for node in (*model.graph.node, *(n for f in model.functions for n in f.node)):
        del node.metadata_props[:]
        node.doc_string = ""
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).resolve().parents[1] / "tests" / "families"
    parser.add_argument("-o", "--output", type=Path, default=default, help="folder (default: tests/families)")
    parser.add_argument("names", nargs="*", default=list(FAMILIES), help="families (default: all)")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    for name in arguments.names:
        model = export(FAMILIES[name])
        files.write_bytes(arguments.output / f"{name}.onnx", model)
        print(f"{name:20s} {len(model) / 1e3:6.1f} kB")


if __name__ == "__main__":
    main()

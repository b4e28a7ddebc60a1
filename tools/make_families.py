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


BATCH: Axes = {0: "batch"}
SEQUENCE: Axes = {0: "batch", 1: "length"}

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
    "conformer": Family(Conformer, {"features": (2, 48, 19)}, 17, SEQUENCE),
    "conformer_modern": Family(Conformer, {"features": (2, 48, 19)}, 18, BATCH, modern=True),
    "wav2vec": Family(Wav2Vec, {"waveform": (2, 400)}, 13, SEQUENCE),
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
            output_names=["output"],
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

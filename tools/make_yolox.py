"""Train a small detector with the head of YOLOX, for the images of make_detector.py, and write it.

Every block is what YOLOX-Nano is made of (Ge et al. 2021, https://arxiv.org/abs/2107.08430): a depthwise and
a pointwise convolution, each with BatchNorm and SiLU. As a SiLU stands between all of them, no scale of a
channel can be folded into what makes it. Two levels have decoupled heads: classes from one branch, box and
objectness from another. The output is joined, as YOLOX exports it with its decoding inside.

The gains of BatchNorm start from a log-normal distribution, and the weights that read a channel at the
inverse, so that the ranges of channels differ by orders of magnitude as in networks trained for long: this
spread is induced, training only keeps it.

    yolox.onnx      float32 `images` (N, 3, 160, 160) in 0-1 -> `detections` (N, 500, 8): centre x, centre y,
                    width, height in pixels, objectness, and a score for each class; opset 17

Its data are those of make_detector.py. Everything is seeded. It takes minutes.

Needs the `tools` extra: pip install "trtq[tools]".
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from make_detector import CLASSES, SIDE, STRIDES, TRAIN_ROWS, dataset, export, loss_of, train
from torch import Tensor, nn
from torch.nn import functional

from trtq import files

GAIN_SPREAD = 1.5  # standard deviation of the logarithm of BatchNorm's initial gains


class Block(nn.Module):
    """A convolution, BatchNorm and SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(self.norm(self.conv(x)))


def separable(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3x3 depthwise, then 1x1."""
    return nn.Sequential(Block(inputs, inputs, 3, stride, inputs), Block(inputs, outputs, 1))


class Bottleneck(nn.Module):
    """1x1, then separable, and a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(Block(channels, channels, 1), separable(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Head(nn.Module):
    """Class scores from one branch, box and objectness from another."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.stem = Block(inputs, channels, 1)
        self.kinds, self.places = (
            nn.Sequential(separable(channels, channels), separable(channels, channels)) for _ in range(2)
        )
        self.kind = nn.Conv2d(channels, len(CLASSES), 1)
        self.box = nn.Conv2d(channels, 4, 1)
        self.objectness = nn.Conv2d(channels, 1, 1)
        nn.init.constant_(self.objectness.bias, -4.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        kinds, places = self.kinds(x), self.places(x)
        scores = [self.objectness(places).sigmoid(), self.kind(kinds).sigmoid()]
        return torch.cat([self.box(places), *scores], dim=1).flatten(2)


class Yolox(nn.Module):
    """Backbone to strides 8 and 16, one way back up, a head for each level."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(Block(3, 16, 3, 2), separable(16, 24, 2))
        self.fine = nn.Sequential(separable(24, 48, 2), Bottleneck(48), Bottleneck(48))
        self.coarse = nn.Sequential(separable(48, 72, 2), Bottleneck(72))
        self.reduce = Block(72, 48, 1)
        self.merge = separable(96, 48)
        self.down = separable(48, 48, 2)
        self.heads = nn.ModuleList([Head(48, 48), Head(96, 48)])
        centres, strides = [], []
        for stride in STRIDES:
            axis = torch.arange(SIDE // stride) + 0.5
            y, x = torch.meshgrid(axis, axis, indexing="ij")
            centres.append(torch.stack([x, y], dim=-1).reshape(-1, 2))
            strides.append(torch.full((axis.numel() ** 2, 1), float(stride)))
        self.register_buffer("centres", torch.cat(centres), persistent=False)
        self.register_buffer("strides", torch.cat(strides), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(self.stem(images))
        top = self.reduce(self.coarse(fine))
        merged = self.merge(torch.cat([fine, functional.interpolate(top, scale_factor=2.0)], dim=1))
        levels = merged, torch.cat([self.down(merged), top], dim=1)
        rows = torch.cat([head(level) for head, level in zip(self.heads, levels, strict=True)], dim=2)
        rows = rows.permute(0, 2, 1)
        middle = (rows[..., :2] + self.centres) * self.strides
        return torch.cat([middle, rows[..., 2:4].exp() * self.strides, rows[..., 4:]], dim=-1)


def spread_ranges(network: Yolox, seed: int) -> None:
    """Log-normal BatchNorm gains within each separable convolution, whose second starts at their inverse."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Sequential) and all(isinstance(part, Block) for part in module):
            for first, second in zip(module, list(module)[1:], strict=False):
                gain = torch.exp(GAIN_SPREAD * torch.randn(first.norm.num_features, generator=generator))
                first.norm.weight.data = gain
                alone = second.conv.groups > 1
                second.conv.weight.data /= gain.reshape((-1, 1, 1, 1) if alone else (1, -1, 1, 1))
        if isinstance(module, Bottleneck):
            first, second = module.body[0], module.body[1][0]
            gain = torch.exp(GAIN_SPREAD * torch.randn(first.norm.num_features, generator=generator))
            first.norm.weight.data = gain
            second.conv.weight.data /= gain.reshape(-1, 1, 1, 1)


def loss_of_rows(rows: Tensor, boxes: Tensor, classes: Tensor) -> Tensor:
    """That of make_detector.py, for corners and the product of objectness and class score."""
    middle, sides, scores = rows[..., :2], rows[..., 2:4], rows[..., 4:5] * rows[..., 5:]
    corners = torch.cat([middle - sides / 2, middle + sides / 2], dim=-1)
    return loss_of(torch.cat([corners, scores], dim=-1).transpose(1, 2), boxes, classes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="ONNX file")
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    network = Yolox()
    spread_ranges(network, arguments.seed)
    data = dataset(TRAIN_ROWS, 3 * arguments.seed)
    model = export(train(network, loss_of_rows, data, arguments.epochs, arguments.seed))
    files.write_bytes(arguments.output, model)
    print(f"written to {arguments.output}: {len(model) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()

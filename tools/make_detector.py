"""Train a small one-stage detector whose plain INT8 output is badly wrong, and write it with its data.

An anchor-free detector (SiLU, depthwise-separable convolutions, a feature pyramid of two levels) finds
ellipses, rectangles and triangles in synthetic images of 160 x 160 pixels. Like exported YOLO models it has
one output that holds both boxes (pixels, 0 to 160) and scores (0 to 1), so that any figure over the whole
tensor speaks of the boxes alone. BatchNorm gains behind the depthwise convolutions start from a log-normal
distribution, so that the channels of an activation differ in range by orders of magnitude, as folded
MobileNets do (Nagel et al. 2019, https://arxiv.org/abs/1906.04721): one scale for all drowns the small ones.
In the backbone nothing stands between depthwise and pointwise convolution, in the heads a SiLU does.

    detector.onnx   float32 `images` (N, 3, 160, 160) in 0-1 -> `detections` (N, 7, 500): x0, y0, x1, y1,
                    and a score for each class; opset 17
    calib.npz       `pixels` uint8 (N, 160, 160, 3)
    eval.npz        the same, and `objects` float32 (N, 6, 5): x0, y0, x1, y1, class; class -1 is padding
    metric.py       `map50(outputs, targets)`: mean average precision at an overlap of 0.5
    recipe.toml     how pixels become inputs

Everything is seeded, so a rerun on the same PyTorch and machine gives the same weights. It takes minutes.

Needs the `tools` extra: pip install "trtq[tools]".
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from make_demo import write_npz
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional

from trtq import files

SIDE = 160
CLASSES = ("ellipse", "rectangle", "triangle")
MOST_OBJECTS = 6
STRIDES = (8, 16)
LARGE = 56.0  # pixels: longer sides than this belong to the coarse level
TRAIN_ROWS, CALIB_ROWS, EVAL_ROWS = 3072, 128, 256
GAIN_SPREAD = 1.5  # standard deviation of the logarithm of BatchNorm's initial gains
OPSET = 17
METRIC = Path(__file__).resolve().parents[1] / "tests" / "families" / "detector" / "metric.py"
RECIPE = """\
metric = "metric.py:map50"

[preprocess.images]
from = "pixels"
scale = "1/255"
layout = "NCHW"
"""

Arrays = dict[str, NDArray]


# --- images -----------------------------------------------------------------------------------------------


def draw(random: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """An image (160, 160, 3) with one to six shapes of little contrast, and what it shows (6, 5)."""
    top, bottom = random.integers(40, 200, (2, 3))
    ramp = np.linspace(top, bottom, SIDE)[:, None].round(-1).astype(np.uint8)
    image = Image.fromarray(np.repeat(ramp, SIDE, axis=1))
    pen = ImageDraw.Draw(image)
    for _ in range(random.integers(2, 6)):  # lines that are no object
        ends = [int(v) for v in random.integers(0, SIDE, 4)]
        pen.line(ends, fill=color(random), width=int(random.integers(1, 4)))
    objects = np.full((MOST_OBJECTS, 5), -1, np.float32)
    boxes: list[NDArray[np.float32]] = []
    for _ in range(random.integers(1, MOST_OBJECTS + 1)):
        sides = np.exp(random.uniform(np.log(14), np.log(100), 1)) * random.uniform(0.75, 1.33, 2)
        start = random.uniform(2, SIDE - 2 - np.minimum(sides, SIDE - 8))
        box = np.concatenate([start, np.minimum(start + sides, SIDE - 2)]).round().astype(np.float32)
        if any(overlap(box[None], other[None])[0, 0] > 0.15 for other in boxes):
            continue
        kind = int(random.integers(len(CLASSES)))
        shade = np.asarray(image)[int(box[1] + box[3]) // 2, int(box[0] + box[2]) // 2].astype(int)
        contrast = random.uniform(18, 90) * random.choice([-1, 1], 3)
        paint(pen, kind, box, tuple(int(v) for v in np.clip(shade + contrast, 0, 255)), random)
        objects[len(boxes)] = [*box, kind]
        boxes.append(box)
    return np.asarray(image), objects


def color(random: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(v) for v in random.integers(0, 256, 3))


def paint(
    pen: ImageDraw.ImageDraw,
    kind: int,
    box: NDArray[np.float32],
    fill: tuple[int, ...],
    random: np.random.Generator,
) -> None:
    x0, y0, x1, y1 = (float(v) for v in box)
    if kind == 0:
        pen.ellipse((x0, y0, x1, y1), fill)
    elif kind == 1:
        pen.rectangle((x0, y0, x1, y1), fill)
    else:
        apex = float(random.uniform(x0, x1))
        pen.polygon([(x0, y1), (x1, y1), (apex, y0)], fill)


def overlap(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Intersection over union of boxes (n, 4) and (m, 4) as (n, m)."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (a, b)]
    return shared / (areas[0][:, None] + areas[1][None] - shared)


def dataset(rows: int, seed: int) -> Arrays:
    """`pixels` uint8 (rows, 160, 160, 3) and `objects` float32 (rows, 6, 5)."""
    random = np.random.default_rng(seed)
    pixels, objects = zip(*(draw(random) for _ in range(rows)), strict=True)
    return {"pixels": np.stack(pixels), "objects": np.stack(objects)}


# --- the network ------------------------------------------------------------------------------------------


class Separable(nn.Module):
    """3x3 depthwise, BatchNorm, `between`, 1x1, BatchNorm, SiLU; a residual where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, between: nn.Module | None = None) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(inputs)
        self.between = between or nn.Identity()
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.pointwise_bn = nn.BatchNorm2d(outputs)
        self.residual = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.between(self.depthwise_bn(self.depthwise(x)))
        y = functional.silu(self.pointwise_bn(self.pointwise(y)))
        return x + y if self.residual else y


class Head(nn.Module):
    """Boxes in pixels and scores of one level, from a branch each."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.box, self.score = (
            nn.Sequential(Separable(channels, channels, between=nn.SiLU()), nn.Conv2d(channels, outputs, 1))
            for outputs in (4, len(CLASSES))
        )
        nn.init.constant_(self.score[1].bias, -4.0)
        self.stride = stride
        axis = (torch.arange(SIDE // stride) + 0.5) * stride
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        self.register_buffer("centres", torch.stack([x, y])[None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        distances = functional.softplus(self.box(x)) * self.stride
        boxes = torch.cat([self.centres - distances[:, :2], self.centres + distances[:, 2:]], dim=1)
        return torch.cat([boxes, self.score(x).sigmoid()], dim=1).flatten(2)


class Detector(nn.Module):
    """Backbone to strides 8 and 16, one way back up, a head for each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16), nn.SiLU(), Separable(16, 24, 2)
        )
        self.fine = nn.Sequential(
            Separable(24, 24), Separable(24, 48, 2), Separable(48, 48), Separable(48, 48)
        )
        self.coarse = nn.Sequential(Separable(48, 72, 2), Separable(72, 72), Separable(72, 72))
        self.reduce = nn.Conv2d(72, 48, 1)
        self.merge = Separable(96, 48)
        self.down = Separable(48, 48, 2)
        self.heads = nn.ModuleList([Head(48, STRIDES[0]), Head(96, STRIDES[1])])

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(self.stem(images))
        top = self.reduce(self.coarse(fine))
        merged = self.merge(torch.cat([fine, functional.interpolate(top, scale_factor=2.0)], dim=1))
        levels = merged, torch.cat([self.down(merged), top], dim=1)
        return torch.cat([head(level) for head, level in zip(self.heads, levels, strict=True)], dim=2)


def spread_ranges(network: Detector, seed: int) -> None:
    """Log-normal BatchNorm gains between depthwise and pointwise, which starts at their inverse."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, Separable):
            gain = torch.exp(GAIN_SPREAD * torch.randn(module.depthwise_bn.num_features, generator=generator))
            module.depthwise_bn.weight.data = gain
            module.pointwise.weight.data /= gain[None, :, None, None]


# --- training ---------------------------------------------------------------------------------------------


def assigned(objects: Tensor) -> tuple[Tensor, Tensor]:
    """For each of the 500 positions the box (N, 4, 500) and class (N, 500; -1 for none) that it should see.

    A position sees the smallest object of its level whose central part it lies in.
    """
    corners, kinds = objects[:, :, :4], objects[:, :, 4]
    sides = corners[..., 2:] - corners[..., :2]
    middle = corners[..., :2] + sides / 2
    boxes, classes = [], []
    for stride in STRIDES:
        axis = (torch.arange(SIDE // stride) + 0.5) * stride
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        points = torch.stack([x, y], dim=-1).reshape(1, 1, -1, 2)
        reach = torch.clamp(sides / 4, min=0.75 * stride)[:, :, None]
        inside = ((points - middle[:, :, None]).abs() < reach).all(dim=-1)
        fine = sides.amax(dim=-1) < LARGE
        inside &= ((fine if stride == STRIDES[0] else ~fine) & (kinds >= 0))[:, :, None]
        area = torch.where(inside, sides.prod(dim=-1)[:, :, None], torch.inf)
        best = area.argmin(dim=1)
        boxes.append(torch.gather(corners, 1, best[..., None].expand(-1, -1, 4)))
        classes.append(torch.where(inside.any(dim=1), torch.gather(kinds, 1, best), -1.0))
    return torch.cat(boxes, dim=1).transpose(1, 2), torch.cat(classes, dim=1).long()


def loss_of(detections: Tensor, boxes: Tensor, classes: Tensor) -> Tensor:
    """Focal loss of the scores plus 1 - GIoU of the boxes at positions that see an object."""
    scores = detections[:, 4:].clamp(1e-6, 1 - 1e-6)
    wanted = functional.one_hot(classes.clamp(min=0), len(CLASSES)).transpose(1, 2)
    wanted = wanted * (classes >= 0)[:, None]
    right = torch.where(wanted == 1, scores, 1 - scores)
    focal = (-((1 - right) ** 2) * right.log()).sum()
    seen = classes >= 0
    made, meant = detections[:, :4].transpose(1, 2)[seen], boxes.transpose(1, 2)[seen]
    low, high = torch.maximum(made[:, :2], meant[:, :2]), torch.minimum(made[:, 2:], meant[:, 2:])
    shared = (high - low).clamp(min=0).prod(dim=1)
    areas = [(b[:, 2:] - b[:, :2]).clamp(min=0).prod(dim=1) for b in (made, meant)]
    union = areas[0] + areas[1] - shared
    hull = torch.maximum(made[:, 2:], meant[:, 2:]) - torch.minimum(made[:, :2], meant[:, :2])
    hull = hull.clamp(min=0).prod(dim=1)
    giou = shared / (union + 1e-6) - (hull - union) / (hull + 1e-6)
    return (focal + (1 - giou).sum()) / seen.sum().clamp(min=1)


def train(
    network: nn.Module,
    loss_of: Callable[[Tensor, Tensor, Tensor], Tensor],
    data: Arrays,
    epochs: int,
    seed: int,
) -> nn.Module:
    """The trained network in evaluation mode.

    Args:
        loss_of: from what the network gives, and the boxes and classes that `assigned` gives.
    """
    generator = torch.Generator().manual_seed(seed)
    network = network.to(memory_format=torch.channels_last)
    pixels = torch.from_numpy(data["pixels"]).permute(0, 3, 1, 2)
    boxes, classes = assigned(torch.from_numpy(data["objects"]))
    batch = 32
    steps = len(pixels) // batch
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs=epochs, steps_per_epoch=steps)
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(pixels), generator=generator)
        for rows in order[: steps * batch].reshape(steps, batch):
            loss = loss_of(network(pixels[rows].float() / 255), boxes[rows], classes[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1:3d}/{epochs}  loss {total / steps:.4f}", flush=True)
    return network.eval()


# --- files ------------------------------------------------------------------------------------------------


def export(network: nn.Module) -> bytes:
    """`network` as ONNX, with BatchNormalization as PyTorch leaves it."""
    program = torch.onnx.export(
        network,
        (torch.zeros(2, 3, SIDE, SIDE),),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["detections"],
        dynamic_shapes={"images": {0: "N"}},
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:  # stack traces of PyTorch
        del node.metadata_props[:]
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def mean_precision(model: bytes, data: Arrays) -> float:
    """The metric by ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    images = np.moveaxis(data["pixels"], -1, 1).astype(np.float32) / 255
    parts = [session.run(None, {"images": images[i : i + 32]})[0] for i in range(0, len(images), 32)]
    spec = importlib.util.spec_from_file_location("metric", METRIC)
    assert spec is not None
    assert spec.loader is not None
    metric = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(metric)
    return float(metric.map50({"detections": np.concatenate(parts)}, {"objects": data["objects"]}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder")
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    seed = 3 * arguments.seed
    calib, evaluation = dataset(CALIB_ROWS, seed + 1), dataset(EVAL_ROWS, seed + 2)
    torch.manual_seed(arguments.seed)
    network = Detector()
    spread_ranges(network, arguments.seed)
    model = export(train(network, loss_of, dataset(TRAIN_ROWS, seed), arguments.epochs, arguments.seed))
    print(f"mAP@0.5 on the {EVAL_ROWS} images of eval.npz: {mean_precision(model, evaluation):.4f}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    files.write_bytes(arguments.output / "detector.onnx", model)
    write_npz(arguments.output / "calib.npz", {"pixels": calib["pixels"]})
    write_npz(arguments.output / "eval.npz", evaluation)
    files.write_bytes(arguments.output / "metric.py", METRIC.read_bytes())
    files.write_text(arguments.output / "recipe.toml", RECIPE)
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()

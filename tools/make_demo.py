"""Train the demo network and write the bundled assets: `digits.onnx`, `calib.npz`, `eval.npz`.

A small MobileNetV2-like classifier (depthwise convolutions, residual adds, ReLU6) learns the
handwritten digits that scikit-learn bundles: 1797 grey 8x8 images, pixels 0-16, scaled here to
0-1. The model is exported with its BatchNormalization nodes unfolded, as a training framework
leaves it before any deployment tool has seen it.

    digits.onnx   float32 `image` (N, 1, 8, 8) -> float32 `logits` (N, 10); opset 17; its metadata
                  says the accuracy on eval.npz (`eval_top1`) and where the data comes from
    calib.npz     `image` float32 (256, 1, 8, 8), `label` int64 (256,)
    eval.npz      the same for 500 other images; neither set was trained on

Everything is seeded and single-threaded, so a rerun on the same PyTorch and machine gives the same
weights. It takes about a minute.

Data: Alpaydin, E. and Kaynak, C. (1998), Optical Recognition of Handwritten Digits, UCI Machine
Learning Repository, https://doi.org/10.24432/C50P49, CC BY 4.0; the test part, as redistributed by
scikit-learn (BSD-3-Clause). The network is trained here from scratch.

Needs the `tools` extra: pip install "trtq[tools]".
"""

from __future__ import annotations

import argparse
import io
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from trtq import files

CALIB_ROWS = 256
EVAL_ROWS = 500
OPSET = 17
IR_VERSION = 8
DATA_SOURCE = (
    "Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998, UCI, "
    "https://doi.org/10.24432/C50P49, CC BY 4.0) via scikit-learn load_digits"
)

Arrays = dict[str, np.ndarray]


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A "same"-padded convolution without bias: BatchNorm follows it."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


class InvertedResidual(nn.Module):
    """MobileNetV2's block: 1x1 expand, 3x3 depthwise, linear 1x1 project, residual where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, expansion: int = 4) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = convolution(inputs, hidden, 1)
        self.expand_bn = nn.BatchNorm2d(hidden)
        self.expand_relu6 = nn.ReLU6()
        self.depthwise = convolution(hidden, hidden, 3, stride, groups=hidden)
        self.depthwise_bn = nn.BatchNorm2d(hidden)
        self.depthwise_relu6 = nn.ReLU6()
        self.project = convolution(hidden, outputs, 1)
        self.project_bn = nn.BatchNorm2d(outputs)
        self.residual = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand_relu6(self.expand_bn(self.expand(x)))
        y = self.depthwise_relu6(self.depthwise_bn(self.depthwise(y)))
        y = self.project_bn(self.project(y))
        return x + y if self.residual else y


class DigitsNet(nn.Module):
    """Stem convolution, five inverted residual blocks, global average pool, linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = convolution(1, 16, 3)
        self.stem_bn = nn.BatchNorm2d(16)
        self.stem_relu6 = nn.ReLU6()
        self.blocks = nn.Sequential(
            InvertedResidual(16, 16),
            InvertedResidual(16, 24, stride=2),
            InvertedResidual(24, 24),
            InvertedResidual(24, 32, stride=2),
            InvertedResidual(32, 32),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem_relu6(self.stem_bn(self.stem(image)))
        return self.classifier(self.flatten(self.pool(self.blocks(x))))


def split_digits(seed: int) -> tuple[Arrays, Arrays, Arrays]:
    """Disjoint train, calibration and evaluation sets: `image` float32 (N, 1, 8, 8) in 0-1, `label` int64."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[:, None]
    labels = digits.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(labels))
    parts = np.split(order, [CALIB_ROWS, CALIB_ROWS + EVAL_ROWS])
    calib, evaluation, train = ({"image": images[rows], "label": labels[rows]} for rows in parts)
    return train, calib, evaluation


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image of (N, 1, 8, 8) moved by -1, 0 or 1 pixel in either direction, zeros moved in."""
    padded = functional.pad(images, (1, 1, 1, 1))
    offsets = torch.randint(0, 3, (len(images), 2), generator=generator)
    rows = offsets[:, 0, None, None] + torch.arange(8)[:, None]
    columns = offsets[:, 1, None, None] + torch.arange(8)[None, :]
    return padded[torch.arange(len(images))[:, None, None], 0, rows, columns].unsqueeze(1)


def train_network(data: Arrays, epochs: int, seed: int) -> DigitsNet:
    """`DigitsNet` in evaluation mode, trained with AdamW and a one-cycle learning rate."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = DigitsNet()
    images, labels = torch.from_numpy(data["image"]), torch.from_numpy(data["label"])
    batch = 64
    steps = len(labels) // batch
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, epochs=epochs, steps_per_epoch=steps)
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(labels), generator=generator)
        for rows in order[: steps * batch].reshape(steps, batch):
            loss = functional.cross_entropy(
                network(shifted(images[rows], generator)), labels[rows], label_smoothing=0.05
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1:3d}/{epochs}  loss {total / steps:.4f}", flush=True)
    return network.eval()


def export(network: DigitsNet) -> onnx.ModelProto:
    """`network` as ONNX with BatchNormalization kept and nodes named after PyTorch's modules."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that keeps BatchNormalization is the older one
        torch.onnx.export(
            network,
            (torch.zeros(2, 1, 8, 8),),
            buffer,
            dynamo=False,
            opset_version=OPSET,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
        )
    model = onnx.load_model_from_string(buffer.getvalue())
    model.ir_version = IR_VERSION
    rename(model.graph)
    onnx.checker.check_model(model, full_check=True)
    return model


def rename(graph: onnx.GraphProto) -> None:
    """Turn the exporter's "/blocks/blocks.1/depthwise/Conv" into "blocks.1.depthwise", tensors likewise."""
    outputs = {value.name for value in graph.output}
    tensors: dict[str, str] = {}
    for node in graph.node:
        *modules, operator = node.name.strip("/").split("/")
        module = ".".join(part.split(".")[-1] for part in modules)
        suffixed = operator.startswith(("Add", "Constant"))  # all but these are alone in their module
        node.name = f"{module}.{operator.lower()}" if suffixed else module
        tensors |= {name: node.name for name in node.output if name not in outputs}
        node.input[:] = [tensors.get(name, name) for name in node.input]
        node.output[:] = [tensors.get(name, name) for name in node.output]
    del graph.value_info[:]


def top1(model: onnx.ModelProto, data: Arrays) -> float:
    """Share of right answers by ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": data["image"]})
    return float((logits.argmax(axis=1) == data["label"]).mean())


def write_npz(path: Path, data: Arrays) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **data)
    files.write_bytes(path, buffer.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).resolve().parents[1] / "trtq" / "demo"
    parser.add_argument("-o", "--output", type=Path, default=default, help="folder (default: trtq/demo)")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    train, calib, evaluation = split_digits(arguments.seed)
    model = export(train_network(train, arguments.epochs, arguments.seed))
    accuracy = top1(model, evaluation)
    model.producer_name = "trtq tools/make_demo.py"
    onnx.helper.set_model_props(model, {"eval_top1": f"{accuracy:.4f}", "data": DATA_SOURCE})

    for name, data in (("train", train), ("calib", calib), ("eval", evaluation)):
        print(f"{name:5s}  {len(data['label']):5d} images  top-1 {top1(model, data):.4f}")
    files.write_bytes(arguments.output / "digits.onnx", model.SerializeToString())
    write_npz(arguments.output / "calib.npz", calib)
    write_npz(arguments.output / "eval.npz", evaluation)
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()

"""Trains a small detector of one square, filled or hollow, and writes the model and data."""

import numpy as np
import torch


def scenes(count: int, seed: int) -> dict[str, np.ndarray]:
    """Images (count, 1, 24, 24) with one square each, its box in pixels and its kind."""
    random = np.random.default_rng(seed)
    images = random.normal(0, 0.1, (count, 1, 24, 24)).astype(np.float32)
    size = random.integers(8, 15, count)
    x, y = (random.integers(0, 24 - size) for _ in "xy")
    kind = random.integers(0, 2, count)
    for image, s, left, top, hollow in zip(images, size, x, y, kind, strict=True):
        image[0, top : top + s, left : left + s] += 1
        if hollow:
            image[0, top + 2 : top + s - 2, left + 2 : left + s - 2] -= 1
    boxes = np.stack([x, y, x + size, y + size], axis=1).astype(np.float32)
    return {"image": images, "true_box": boxes, "kind": kind}


class Detector(torch.nn.Module):
    """Three convolutions; one linear layer for the box, one for the scores."""

    def __init__(self) -> None:
        super().__init__()
        layers = [torch.nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in ((1, 16), (16, 32), (32, 32))]
        self.body = torch.nn.Sequential(*(part for layer in layers for part in (layer, torch.nn.ReLU())))
        self.box, self.scores = torch.nn.Linear(32 * 9, 4), torch.nn.Linear(32 * 9, 2)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.body(image).flatten(1)
        return 24 * torch.sigmoid(self.box(found)), self.scores(found)


torch.manual_seed(0)
model, data = Detector(), {k: torch.from_numpy(v) for k, v in scenes(3000, seed=0).items()}
optimizer = torch.optim.Adam(model.parameters(), 2e-3)
for step in range(600):
    rows = torch.arange(64 * step, 64 * step + 64) % 3000
    box, scores = model(data["image"][rows])
    loss = (box - data["true_box"][rows]).abs().mean() / 4
    loss = loss + torch.nn.functional.cross_entropy(scores, data["kind"][rows])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

torch.onnx.export(
    model.eval(),
    (torch.zeros(2, 1, 24, 24),),
    "model.onnx",
    input_names=["image"],
    output_names=["box", "scores"],
    dynamic_shapes=({0: "batch"},),
)
np.savez("calib.npz", image=scenes(200, seed=1)["image"])
np.savez("eval.npz", **scenes(800, seed=2))

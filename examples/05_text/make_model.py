"""Trains a small attention model with two inputs, and writes the model and data."""

import numpy as np
import torch

LENGTH, TOKENS, WIDTH = 24, 50, 32


def sequences(count: int, seed: int) -> dict[str, np.ndarray]:
    """Token numbers, 0 for padding, and whether token 2 occurs more often than token 3."""
    random = np.random.default_rng(seed)
    tokens = random.integers(4, TOKENS, (count, LENGTH))
    label = random.integers(0, 2, count)
    for row, more in zip(tokens, label, strict=True):
        places = random.permutation(8)
        row[places[:5]] = 2 if more else 3
        row[places[5:7]] = 3 if more else 2
    mask = (np.arange(LENGTH) < random.integers(8, LENGTH + 1, (count, 1))).astype(np.int64)
    return {"tokens": tokens * mask, "mask": mask, "label": label}


class Model(torch.nn.Module):
    """An embedding, one layer of attention, a mean over what the mask shows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(TOKENS, WIDTH)
        self.query, self.key, self.value, self.out = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm, self.head = torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, 2)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        shown = mask.to(x.dtype)
        scores = self.query(x) @ self.key(x).transpose(1, 2) / WIDTH**0.5
        weights = torch.softmax(scores + (shown[:, None] - 1) * 100, dim=-1)
        x = self.norm(x + self.out(weights @ self.value(x)))
        pooled = (x * shown[..., None]).sum(dim=1) / shown.sum(dim=1, keepdim=True)
        return self.head(pooled)


torch.manual_seed(0)
model, data = Model(), {k: torch.from_numpy(v) for k, v in sequences(4000, seed=0).items()}
optimizer = torch.optim.Adam(model.parameters(), 3e-3)
for step in range(300):
    rows = torch.arange(64 * step, 64 * step + 64) % 4000
    logits = model(data["tokens"][rows], data["mask"][rows])
    loss = torch.nn.functional.cross_entropy(logits, data["label"][rows])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

names = {"tokens": {0: "batch", 1: "length"}, "mask": {0: "batch", 1: "length"}}
torch.onnx.export(
    model.eval(),
    (data["tokens"][:2], data["mask"][:2]),
    "model.onnx",
    input_names=["tokens", "mask"],
    output_names=["logits"],
    dynamic_shapes=names,
)
np.savez("calib.npz", **{k: v for k, v in sequences(256, seed=1).items() if k != "label"})
np.savez("eval.npz", **sequences(800, seed=2))

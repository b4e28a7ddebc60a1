"""A small network for four kinds of stripes, trained in a few seconds."""

import math

import torch
from torch.utils.data import DataLoader, Dataset


class Stripes(Dataset):
    """Noisy 16x16 images of stripes in one of four directions, and its number."""

    def __init__(self, count: int, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(4, (count,), generator=random)
        grid = torch.arange(16.0)
        angle = self.labels[:, None, None] * math.pi / 4
        phase = 6.28 * torch.rand(count, 1, 1, generator=random)
        waves = torch.sin(grid[:, None] * torch.sin(angle) + grid * torch.cos(angle) + phase)
        noise = torch.randn(count, 16, 16, generator=random)
        self.images = (waves + noise)[:, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], self.labels[index]


class Net(torch.nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(1, 16, 5, padding=2)
        self.second = torch.nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.last = torch.nn.Linear(32, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        found = torch.relu(self.second(torch.relu(self.first(image))))
        return self.last(found.mean(dim=(2, 3)))


def train() -> Net:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(4):
        for images, labels in DataLoader(Stripes(2000, seed=0), batch_size=64):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


if __name__ == "__main__":
    torch.save(train().state_dict(), "model.pt")

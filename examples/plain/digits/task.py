"""digits: model, data, and loops."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """64-300-100-10."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
        )

    def forward(self, x):
        return self.layers(x)


def load_data(partition: int, partitions: int, batch_size: int = 32):
    """Every ``partitions``-th of the first 1400 images to train on; the last 397 to test on."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    x, y = torch.tensor(x, dtype=torch.float32)[order] / 16, torch.tensor(y)[order]
    mine = TensorDataset(x[:1400][partition::partitions], y[:1400][partition::partitions])
    shuffle = torch.Generator().manual_seed(partition)
    return DataLoader(mine, batch_size, shuffle=True, generator=shuffle), DataLoader(
        TensorDataset(x[1400:], y[1400:]), 397
    )


def train(model, optimizer, loader, epochs):
    """An ordinary training loop."""
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
    return loss.item()


@torch.no_grad()
def test(model, loader):
    """Accuracy."""
    model.eval()
    right = sum((model(x).argmax(1) == y).sum().item() for x, y in loader)
    return right / len(loader.dataset)

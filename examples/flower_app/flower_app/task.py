"""The model and the data: plain PyTorch and scikit-learn."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


def model() -> nn.Module:
    """A small network for 8 × 8 images of digits."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def load(partition: int, partitions: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test examples of one client: (x, y, x_test, y_test)."""
    x, y = load_digits(return_X_y=True)
    mine = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[partition::partitions]
    x, y = torch.tensor(x, dtype=torch.float32)[mine] / 16, torch.tensor(y)[mine]
    cut = len(y) * 4 // 5
    return x[:cut], y[:cut], x[cut:], y[cut:]

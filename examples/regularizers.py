"""Recurrent regularisers: a noisy periodic signal, predicted with and without each of them.

    python examples/regularizers.py [--epochs 150]

Too few and too noisy examples for so many units: the plain LSTM learns the noise.
"""

import argparse

import torch
from torch import nn

import fusedrnn

CHOICES = {
    "none": {},
    "variational dropout": {"input_dropout": 0.1, "recurrent_dropout": 0.3},  # Gal, Ghahramani
    "weight drop": {"weight_drop": 0.4},  # Merity, Keskar, Socher
    "zoneout": {"zoneout": (0.15, 0.3)},  # Krueger et al.; of h, of c
}


class Predictor(nn.Module):
    def __init__(self, **regularizers):
        super().__init__()
        self.rnn = fusedrnn.LSTM(1, 48, **regularizers)
        self.head = nn.Linear(48, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def signal(rows: int, steps: int = 30) -> torch.Tensor:
    phase = 6.3 * torch.rand(1, rows, 1)
    time = torch.arange(steps + 1.0)[:, None, None]
    return torch.sin(0.6 * time + phase) + 0.4 * torch.randn(steps + 1, rows, 1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=150)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    train, test = signal(8), signal(256)
    print(f"{'':20}  train   test   (mean squared error; the noise alone is 0.16)")
    for name, regularizers in CHOICES.items():
        torch.manual_seed(1)
        model = Predictor(**regularizers)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(args.epochs):
            loss = nn.functional.mse_loss(model(train[:-1]), train[1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            errors = [nn.functional.mse_loss(model(d[:-1]), d[1:]).item() for d in (train, test)]
        print(f"{name:20}  {errors[0]:.3f}  {errors[1]:.3f}")


if __name__ == "__main__":
    main()

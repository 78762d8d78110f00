"""A cell of one's own, from the equations of a paper to a trained network.

    python examples/own_cell.py [--steps 150]

The sLSTM of xLSTM: an LSTM whose input gate is an exponential. Of everything that is written the
normalizer n keeps the sum of the weights, and the stabilizer m keeps the exponents small. Only the
step is written here, in torch's operators; its backward is derived, and both run in the fused
kernels where there is a GPU. The derived code can be read: the program prints it.

The network learns the parity of the bits that it has seen, after every bit: a task that needs a
state, which models without a recurrence from h to the gates do not solve.

Source: Beck et al. 2024, xLSTM: Extended Long Short-Term Memory, arXiv:2405.04517.
"""

import argparse
import inspect

import torch
import torch.nn.functional as F
from torch import nn

import fusedrnn


@fusedrnn.cell(gates=("i", "f", "z", "o"), states=("h", "c", "n", "m"))
def scalar_lstm(x, hidden, state, params):
    z = torch.tanh(x.z + hidden.z)
    o = torch.sigmoid(x.o + hidden.o)
    log_i = x.i + hidden.i
    log_f = F.logsigmoid(x.f + hidden.f) + state.m
    m = torch.maximum(log_f, log_i)
    i = torch.exp(log_i - m)
    f = torch.exp(log_f - m)
    c = f * state.c + i * z
    n = f * state.n + i
    h = o * c / n
    return h, c, n, m


class Parity(nn.Module):
    """Bits [T, B] to the logits [T, B] of their parity so far."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.rnn = fusedrnn.Recurrent(scalar_lstm, 1, hidden, num_heads=2)
        self.logit = nn.Linear(hidden, 1)

    def forward(self, bits: torch.Tensor) -> torch.Tensor:
        output, _ = self.rnn(2 * bits[..., None] - 1)
        return self.logit(output).squeeze(-1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args(arguments)
    print(inspect.getsource(scalar_lstm.stages[0].backward))

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Parity(hidden=32).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(1, options.steps + 1):
        bits = torch.randint(0, 2, (16, 64), device=device).float()
        parity = bits.cumsum(0) % 2
        logits = model(bits)
        loss = F.binary_cross_entropy_with_logits(logits, parity)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right = ((logits > 0) == (parity > 0)).float().mean().item()
        print(f"\rstep {step}: loss {loss.item():.3f}, {right:.0%} right", end="", flush=True)
    print()


if __name__ == "__main__":
    main()

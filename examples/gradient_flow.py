"""Vanishing and exploding gradients, made visible: RNN, GRU, LSTM and the identity RNN.

    python examples/gradient_flow.py [--steps 50] [--hidden 24] [--out gradient_flow.png]

Above, for every pair of steps, how much input s still changes output t: the sequential Jacobian.
Below, the gradient of a loss on the last output on its way back through time: on the left the
five networks; on the right a relu RNN whose W_hh grows by 10 percent a step, without clipping
and with clipping inside the recurrence.
"""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import fusedrnn
from fusedrnn.gradient_flow import (
    plot_sensitivity,
    plot_state_gradients,
    sensitivity,
    state_gradients,
)


def identity_rnn(inputs: int, hidden: int, scale: float = 1.0, **kwargs) -> fusedrnn.RNN:
    """relu, W_hh = scale * 1, no bias: Le, Jaitly & Hinton 2015, arXiv:1504.00941."""
    module = fusedrnn.RNN(inputs, hidden, nonlinearity="relu", bias=False, **kwargs)
    with torch.no_grad():
        module.weight_hh_l0.copy_(scale * torch.eye(hidden))
        module.weight_ih_l0.normal_(std=0.1).abs_()
    return module


def open_forget_gate(module: fusedrnn.LSTM, bias: float) -> fusedrnn.LSTM:
    """Forget gates that begin open: Gers, Schmidhuber & Cummins 2000."""
    with torch.no_grad():
        module.bias_ih_l0[module.hidden_size : 2 * module.hidden_size] += bias
    return module


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--hidden", type=int, default=24)
    parser.add_argument("--out", default="gradient_flow.png")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    inputs, H = 4, args.hidden
    wide = {"dtype": torch.float64}  # the norms span more than float32 holds
    models = {
        "RNN, tanh": fusedrnn.RNN(inputs, H, **wide),
        "GRU": fusedrnn.GRU(inputs, H, **wide),
        "LSTM": fusedrnn.LSTM(inputs, H, **wide),
        "LSTM, forget bias 3": open_forget_gate(fusedrnn.LSTM(inputs, H, **wide), 3.0),
        "RNN, relu, W_hh = 1": identity_rnn(inputs, H, **wide),
    }
    x = torch.rand(args.steps, 1, inputs, dtype=torch.float64)

    figure = plt.figure(figsize=(17, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.1])
    panels = above.subplots(1, len(models), sharey=True)
    left, right = below.subplots(1, 2)
    print("share of the first input's influence on the last output, against the last input's:")
    for panel, (name, model) in zip(panels, models.items(), strict=True):
        norms = sensitivity(model, x)
        plot_sensitivity(norms, panel, title=name, limits=(-8, 0))
        flow = state_gradients(model, x, lambda output: output[-1].sum())
        plot_state_gradients(flow.norms["h"], left, label=name)
        print(f"  {name:22} {(norms[-1, 0] / norms[-1, -1]).item():.1e}")
        if panel is not panels[0]:
            panel.set_ylabel("")
    label = "log10 |d output_t / d input_s|"
    above.colorbar(panels[-1].images[0], ax=list(panels), label=label, extend="both", shrink=0.8)
    left.set_title("a loss on the last output, on its way back")
    left.legend()

    for clip in (None, 1.0):
        model = identity_rnn(inputs, H, scale=1.1, clip_gradient=clip, **wide)
        flow = state_gradients(model, x, lambda output: output[-1].sum())
        label = "no clipping" if clip is None else f"clip_gradient={clip}"
        plot_state_gradients(flow.norms["h"], right, label=label)
    right.set_title("RNN, relu, W_hh = 1.1: exploding, and clipped inside the recurrence")
    right.legend()
    figure.savefig(args.out, dpi=80)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()

"""Derivatives that torch.nn's modules refuse on a GPU: second ones, per sample, of ensembles.

python examples/derivatives.py
"""

import torch
from torch import func

import fusedrnn


def main() -> None:
    torch.manual_seed(0)
    rnn = fusedrnn.LSTM(3, 8, num_layers=2)
    x = torch.randn(10, 4, 3)

    # A gradient penalty: the gradient of a gradient, in training or in evaluation mode.
    rnn.eval()
    x.requires_grad_()
    (slope,) = torch.autograd.grad(rnn(x)[0].sum(), x, create_graph=True)
    penalty = (slope.norm(dim=(0, 2)) - 1).square().mean()
    penalty.backward()
    print(f"gradient penalty {penalty.item():.3f}, |d penalty / d W_hh| = "
          f"{rnn.weight_hh_l0.grad.norm().item():.3f}")  # fmt: skip

    # The gradient of every sample alone, in one pass.
    parameters = {name: p.detach() for name, p in rnn.named_parameters()}

    def loss(parameters, row):
        return func.functional_call(rnn, parameters, (row,))[0].square().mean()

    gradients = func.vmap(func.grad(loss), in_dims=(None, 1))(parameters, x.detach())
    print("per-sample gradients of weight_hh_l0:", tuple(gradients["weight_hh_l0"].shape))

    # Five models at once.
    models = [fusedrnn.LSTM(3, 8, num_layers=2) for _ in range(5)]
    stacked, buffers = func.stack_module_state(models)
    outputs = func.vmap(lambda p, b: func.functional_call(rnn, (p, b), (x.detach(),))[0])(
        stacked, buffers
    )
    print("outputs of an ensemble:", tuple(outputs.shape))

    # Forward mode: the change of the output with the input, in one direction.
    _, tangent = func.jvp(lambda x: rnn(x)[0], (x.detach(),), (torch.ones_like(x),))
    print("directional derivative:", tuple(tangent.shape))


if __name__ == "__main__":
    main()

"""Gradient flow made visible: what an output knows of an input, and where a gradient dies.

sensitivity     |d output_t / d input_s|, the sequential Jacobian (Graves 2012, chapter 4)
state_gradients |d loss / d h_t| over time
plot_sensitivity, plot_state_gradients: pictures of them, with matplotlib
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, func

from fusedrnn import cells, stack
from fusedrnn.backends import reference
from fusedrnn.modules import Recurrent
from fusedrnn.types import Lengths, Reset, State


def sensitivity(
    module: Recurrent[State],
    input: Tensor,
    hx: State | None = None,
    *,
    lengths: Lengths | None = None,
    reset: Reset[State] | None = None,
    at: list[int] | None = None,
    chunk: int = 512,
) -> Tensor:
    """How much each input step changes each output step: norms of the sequential Jacobian.

        S[t, s, b] = | d output_t / d input_s |_F        of row b

    The Frobenius norm, over the D * H features of the output and the I of the input; exact, by
    one backward pass for every feature of every output step, `chunk` of them at once, and without
    the module's clip_gradient, which would hide what it is there to bound.

    Args:
        module: a recurrent module of fusedrnn.
        input, hx, lengths, reset: as the module takes them; input [T, B, I] or [T, I] ([B, T, I]
            with batch_first), not packed.
        at: the output steps t to look at; None for all.
    Returns:
        [len(at) or T, T, B]; [len(at) or T, T] for unbatched input.
    Raises:
        TypeError: a module that is not fusedrnn's, or packed input.
        ValueError: a step outside the sequence.
    Numerics: in the dtype of the module; float64 if the norms span many orders of magnitude.
    Source: Graves 2012, doi:10.1007/978-3-642-24797-2.
    """
    _check("sensitivity", module, input)
    unbatched = input.dim() == 2
    swap = module.batch_first and not unbatched
    T = input.shape[1] if swap else input.shape[0]
    steps = list(range(T)) if at is None else [t + T if t < 0 else t for t in at]
    if not steps or min(steps) < 0 or max(steps) >= T:
        raise ValueError(f"at: expected steps from {-T} to {T - 1}, got {at}")

    regularizers = module.regularizers
    if regularizers is not None and regularizers.clip_gradient is not None:
        module = copy.copy(module)
        module.regularizers = dataclasses.replace(regularizers, clip_gradient=None)

    def forward(x):
        output = module(x, hx, lengths=lengths, reset=reset)[0]
        return output.transpose(0, 1) if swap else output

    output, pull_back, *_ = func.vjp(forward, input.detach())
    features = output.shape[-1]

    def of_feature(t: Tensor, k: Tensor) -> Tensor:
        time = torch.arange(T, device=output.device) == t
        feature = torch.arange(features, device=output.device) == k
        one = (time[:, None] & feature).to(output.dtype)
        (d_input,) = pull_back(one.expand_as(output) if unbatched else _rows(one, output))
        return d_input.square().sum(-1)

    pairs = torch.cartesian_prod(
        torch.tensor(steps, device=input.device), torch.arange(features, device=input.device)
    ).view(-1, 2)
    squares = func.vmap(of_feature, chunk_size=chunk)(pairs[:, 0], pairs[:, 1])
    squares = squares.unflatten(0, (len(steps), features)).sum(1)
    norms = squares.sqrt().detach()
    return norms.transpose(1, 2) if swap else norms


def _rows(one: Tensor, output: Tensor) -> Tensor:
    return one[:, None, :].expand_as(output)


class StateGradients(NamedTuple):
    """Norms of the gradients of the states, over time.

    Attributes:
        loss: the loss, a float.
        norms: state name ("h", "c") -> [L, D, T, B]: |d loss / d state_t| over the hidden units,
            as it arrives from the step after it, the layers above and the output together.
    """

    loss: float
    norms: dict[str, Tensor]


def state_gradients(
    module: Recurrent[State],
    input: Tensor,
    loss: Callable[[Tensor], Tensor],
    hx: State | None = None,
    *,
    lengths: Lengths | None = None,
    reset: Reset[State] | None = None,
) -> StateGradients:
    """|d loss / d h_t| of every layer, direction and time step: does the gradient vanish, or
    explode, on its way back?

    Args:
        module: a recurrent module of fusedrnn; with its clip_gradient, the clipped gradient.
        input, hx, lengths, reset: as the module takes them; not packed.
        loss: a function of the output to a scalar, as `lambda output: output[-1].sum()`.
    Returns:
        a StateGradients.
    Raises:
        TypeError: a module that is not fusedrnn's, packed input, or a loss that is no scalar.
    """
    _check("state_gradients", module, input)
    for key, hook in list(module._forward_pre_hooks.items()):
        with torch.no_grad():  # pruning and weight_norm compute the weights in one
            kwargs = ({},) if key in module._forward_pre_hooks_with_kwargs else ()
            hook(module, (input, hx), *kwargs)
    with torch.enable_grad():
        leaf = input.detach().requires_grad_()
        given = module._given(leaf, hx, lengths, reset)
        call, operands, masks = stack.gather(given)
        spec, operands, masks = stack.settle(
            call, "reference", operands, masks, module.regularizers
        )
        output, _, nodes = reference.run(spec, operands, masks)
        if input.dim() == 2:
            output = output.squeeze(0 if spec.batch_first else 1)
        value = loss(output)
        if not isinstance(value, Tensor) or value.dim():
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"loss: expected a function to a scalar tensor, got {got}")
        states = [s for steps in nodes for step in steps for s in step]
        gradients = torch.autograd.grad(value, states, allow_unused=True, materialize_grads=True)
    names = cells.get(spec.cell).states
    shape = (module.num_layers, -1, len(nodes[0]), len(names))
    norms = torch.stack([g.norm(dim=-1) for g in gradients]).unflatten(0, shape)
    if input.dim() == 2:
        norms = norms.squeeze(-1)
    return StateGradients(value.item(), {n: norms[:, :, :, s] for s, n in enumerate(names)})


def plot_sensitivity(
    norms: Tensor,
    axes: Any = None,
    *,
    title: str = "",
    limits: tuple[float, float] | None = None,
) -> Any:
    """Draws a sensitivity as a picture: output steps down, input steps across, colour by log10.

    Args:
        norms: what `sensitivity` returned; rows of a batch are averaged.
        axes: of matplotlib; None for new ones.
        limits: of the colours, in powers of ten; with them there is no colour bar.
    Returns:
        the axes. What is exactly 0 stays white.
    """
    plt = _matplotlib()
    norms = norms.detach().cpu()
    norms = norms.mean(-1) if norms.dim() == 3 else norms
    axes = plt.subplots(layout="constrained")[1] if axes is None else axes
    low, high = limits or (None, None)
    logs = norms.masked_fill(norms == 0, float("nan")).log10()
    image = axes.imshow(logs.numpy(), vmin=low, vmax=high)
    if limits is None:
        axes.figure.colorbar(image, ax=axes, label="log10 |d output_t / d input_s|")
    axes.set(xlabel="input step s", ylabel="output step t", title=title)
    return axes


def plot_state_gradients(norms: Tensor, axes: Any = None, *, label: str = "", **style: Any) -> Any:
    """Draws |d loss / d state_t| over t, one line for each layer and direction, on a log scale.

    Args:
        norms: one of the tensors of a `StateGradients`; rows of a batch are averaged.
        axes: of matplotlib; None for new ones.
        label: of the lines; numbered where there are several.
        style: handed on to axes.semilogy.
    Returns:
        the axes.
    """
    plt = _matplotlib()
    norms = norms.detach().cpu()
    norms = norms.mean(-1) if norms.dim() == 4 else norms
    axes = plt.subplots(layout="constrained")[1] if axes is None else axes
    several = norms.shape[0] * norms.shape[1] > 1
    for layer, directions in enumerate(norms):
        for d, line in enumerate(directions):
            name = f"{label} layer {layer}{' reverse' if d else ''}" if several else label
            axes.semilogy(line.masked_fill(line == 0, float("nan")).numpy(), label=name, **style)
    axes.set(xlabel="time step t", ylabel="|d loss / d state_t|")
    return axes


def _matplotlib():
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from error
    return plt


def _check(name: str, module, input) -> None:
    if not isinstance(module, Recurrent):
        raise TypeError(
            f"{name}: module: expected an LSTM, GRU, RNN or Recurrent of fusedrnn, "
            f"got {type(module).__name__}"
        )
    if not isinstance(input, Tensor):
        raise TypeError(
            f"{name}: input: expected a padded tensor, got {type(input).__name__}; use lengths="
        )

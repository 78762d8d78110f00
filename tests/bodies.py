"""The bodies of a whole cell: its stages, one after the other, on random tiles.

A stage receives given sums and, in the place of a product or of a mean, a multiple of the unit's
own values: every unit is its own network, and what the backward bodies hand down through a product
is seen too.
"""

import torch
from tolerances import assert_exact


def tiles(count, scale, *, grad=True):
    return tuple((scale * torch.randn(3, 5).double()).requires_grad_(grad) for _ in range(count))


def arguments(cell, scale):
    """x_gates, what the sums that all stages receive begin with, state, params."""
    sums = sum(stage.products for stage in cell.stages)
    params = tuple(torch.randn(5).double().requires_grad_() for _ in cell.params)
    return tiles(len(cell.gates), scale), tiles(sums, scale), tiles(len(cell.states), scale), params


def product(values, received, stage, first=0):
    """What a stage receives, of which `first` is the number of its first sum in the cell."""
    values = values[: stage.exchanged]
    return tuple(r + (first + k + 1) / 7 * values[k % len(values)] for k, r in enumerate(received))


def forward(cell, x_gates, received, values, params):
    """The new states, and all saved values."""
    x_gates, received, params, saved = list(x_gates), list(received), list(params), []
    count = len(received)
    for stage in cell.stages:
        first = count - len(received)
        x, x_gates = x_gates[: len(stage.gates)], x_gates[len(stage.gates) :]
        r, received = received[: stage.products], received[stage.products :]
        p, params = params[: len(stage.params)], params[len(stage.params) :]
        values, kept = stage.forward(tuple(x), product(values, r, stage, first), values, tuple(p))
        assert len(kept) == len(stage.saved)
        saved += kept
    assert not any((x_gates, received, params))
    return values, tuple(saved)


def backward(cell, d_values, saved, prev, new, params):
    """The derivative of `forward`, by the backward bodies: of x_gates, received, state, params."""
    dx, d_received, d_params, last = [], [], [], len(params)
    first = sum(stage.products for stage in cell.stages)
    for stage in reversed(cell.stages):
        first -= stage.products
        own = params[last - len(stage.params) : last]
        last -= len(stage.params)
        x, r, d_values, p = stage.backward(d_values, saved, prev, new, own)
        passed = list(d_values)
        for k, d in enumerate(r):
            passed[k % stage.exchanged] = passed[k % stage.exchanged] + (first + k + 1) / 7 * d
        d_values = tuple(passed)
        dx, d_received, d_params = [*x, *dx], [*r, *d_received], [*p, *d_params]
    return dx, d_received, d_values, d_params


def assert_backward_is_the_derivative_of_forward(cell, scale):
    """By autograd, of everything that the bodies read; from random gradients of the new states."""
    x_gates, received, state, params = arguments(cell, scale)
    new, saved = forward(cell, x_gates, received, state, params)
    d_state = tiles(len(new), 1.0, grad=False)
    inputs = (*x_gates, *received, *state, *params)
    expected = torch.autograd.grad(new, inputs, d_state, materialize_grads=True)
    with torch.no_grad():
        dx, dr, d_prev, d_params = backward(cell, d_state, saved, state, new, params)
    d_params = [d.sum(0) if d.dim() > 1 else d for d in d_params]
    found = (*dx, *dr, *d_prev, *d_params)
    names = [
        *(f"dx_{gate}" for gate in cell.gates),
        *(f"d_received_{index}" for index in range(len(received))),
        *(f"d_{state}_prev" for state in cell.states),
        *(f"d_{param}" for param in cell.params),
    ]
    assert len(found) == len(expected) == len(names)
    for name, actual, reference in zip(names, found, expected, strict=True):
        assert_exact(actual, reference, name)

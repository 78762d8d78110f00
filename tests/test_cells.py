"""A cell's two bodies: the forward against the paper, the backward against autograd."""

import dataclasses

import numpy as np
import oracles
import pytest
import torch
from tolerances import assert_exact

from fusedrnn import cells
from fusedrnn.cells._cell import check_body

every_cell = pytest.mark.parametrize("cell", cells.REGISTRY.values(), ids=lambda cell: cell.name)


def tiles(count, scale, *, grad=True):
    return tuple((scale * torch.randn(3, 5).double()).requires_grad_(grad) for _ in range(count))


def arguments(cell, scale):
    G = len(cell.gates)
    params = tuple(torch.randn(5).double().requires_grad_() for _ in cell.params)
    return tiles(G, scale), tiles(G, scale), tiles(len(cell.states), scale), params


@every_cell
@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0], ids=["linear", "curved", "saturated"])
def test_backward_is_the_derivative_of_forward(cell, scale):
    x_gates, h_gates, state, params = arguments(cell, scale)
    new, saved = cell.forward(x_gates, h_gates, state, params)
    d_state = tiles(len(new), 1.0, grad=False)
    inputs = (*x_gates, *h_gates, *state, *params)
    expected = torch.autograd.grad(new, inputs, d_state, materialize_grads=True)

    with torch.no_grad():
        dx, dh, d_prev, d_params = cell.backward(d_state, saved, state, new, params)
    d_params = [d.sum(0) if d.dim() > 1 else d for d in d_params]
    found = (*dx, *dh, *d_prev, *d_params)
    names = [
        *(f"dx_{gate}" for gate in cell.gates),
        *(f"dh_{gate}" for gate in cell.gates),
        *(f"d_{state}_prev" for state in cell.states),
        *(f"d_{param}" for param in cell.params),
    ]
    assert len(found) == len(expected) == len(names)
    for name, actual, reference in zip(names, found, expected, strict=True):
        assert_exact(actual, reference, name)


@every_cell
def test_forward_is_the_papers(cell):
    x_gates, h_gates, state, params = arguments(cell, 2.0)
    new, saved = cell.forward(x_gates, h_gates, state, params)
    gates, step = oracles.STEPS[cell.name]
    assert gates == len(cell.gates)
    expected = step(
        np.stack([g.detach().numpy() for g in x_gates]),
        np.stack([g.detach().numpy() for g in h_gates]),
        tuple(s.detach().numpy() for s in state),
        tuple(p.detach().numpy() for p in params),
    )
    assert len(new) == len(cell.states) == len(expected)
    assert len(saved) == len(cell.saved)
    for name, actual, reference in zip(cell.states, new, expected, strict=True):
        assert_exact(actual, reference, name)


def test_every_cell_has_an_oracle():
    assert set(oracles.STEPS) == set(cells.REGISTRY)


@every_cell
def test_additive_says_what_the_body_does(cell):
    x_gates, h_gates, state, params = arguments(cell, 1.0)
    new, _ = cell.forward(x_gates, h_gates, state, params)
    moved = tuple(x + 0.5 for x in x_gates), tuple(h - 0.5 for h in h_gates)
    shifted, _ = cell.forward(*moved, state, params)
    alike = all(torch.allclose(a, b) for a, b in zip(new, shifted, strict=True))
    assert alike == cell.additive


@every_cell
def test_bodies_are_pointwise_in_the_unit(cell):
    """A kernel hands a body any tile: a unit's result must not depend on its neighbours. (But for
    the last bits: torch computes the ends of a tensor with other instructions than its middle.)"""
    x_gates, h_gates, state, params = arguments(cell, 1.0)
    whole, _ = cell.forward(x_gates, h_gates, state, params)

    def part(tensors):
        return tuple(t[..., 1:3] for t in tensors)

    piece, _ = cell.forward(part(x_gates), part(h_gates), part(state), part(params))
    for a, b in zip(part(whole), piece, strict=True):
        assert_exact(a, b.detach(), cell.name)


def body_with_a_foreign_name(x_gates, h_gates, state, params):
    return (np.tanh(x_gates[0]),), ()


def body_with_an_import(x_gates, h_gates, state, params):
    import math

    return (math.tanh(x_gates[0]),), ()


@pytest.mark.parametrize("body", [body_with_a_foreign_name, body_with_an_import])
def test_a_foreign_name_is_refused(body):
    with pytest.raises(NameError, match=r"uses \['(np|math)'.*may use only"):
        check_body(body)
    with pytest.raises(NameError):
        dataclasses.replace(cells.get("rnn_tanh"), name="x", forward=body)


def test_a_cell_must_begin_with_h():
    with pytest.raises(ValueError, match=r"states must start with 'h', got \('c', 'h'\)"):
        dataclasses.replace(cells.get("lstm"), name="x", states=("c", "h"))


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'lstm' is registered already"):
        cells.register(cells.get("lstm"))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"\['gru', 'lstm'.*got 'lstn'"):
        cells.get("lstn")

"""A cell's two bodies: the forward against the paper, the backward against autograd."""

import dataclasses
import subprocess
import sys

import numpy as np
import oracles
import pytest
import torch
from bodies import arguments, assert_backward_is_the_derivative_of_forward, forward, product, tiles
from tolerances import assert_exact

from fusedrnn import cells
from fusedrnn.cells._cell import check_body

ALL = {cell.name: cell for cell in cells.REGISTRY.values()}
PROJECTED = {f"{n}-projected": cells.get(n, projected=True) for n, c in ALL.items() if c.projects}
every_cell = pytest.mark.parametrize("cell", ALL.values(), ids=ALL)
every_recurrence = pytest.mark.parametrize(
    "cell",
    [*ALL.values(), *PROJECTED.values()],
    ids=[*ALL, *PROJECTED],
)


@every_recurrence
@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0], ids=["linear", "curved", "saturated"])
def test_backward_is_the_derivative_of_forward(cell, scale):
    assert_backward_is_the_derivative_of_forward(cell, scale)


@pytest.mark.parametrize(
    "cell", [c for c in ALL.values() if c.weighted == c.stages and not c.dense]
)
def test_forward_is_the_papers(cell):
    """(Of means and matrices of its own, which no unit has by itself: tests/test_reference.py.)"""
    x_gates, received, state, params = arguments(cell, 2.0)
    new, _ = forward(cell, x_gates, received, state, params)
    gates, step = oracles.STEPS[cell.name]
    assert gates == len(cell.gates)
    expected = step(
        np.stack([g.detach().numpy() for g in x_gates]),
        lambda h: np.stack(product((h,), [r.detach().numpy() for r in received], cell.stages[0])),
        tuple(s.detach().numpy() for s in state),
        tuple(p.detach().numpy() for p in params),
    )
    assert len(new) == len(cell.states) == len(expected)
    for name, actual, reference in zip(cell.states, new, expected, strict=True):
        assert_exact(actual, reference, name)


def test_every_cell_has_an_oracle():
    assert set(oracles.STEPS) == set(cells.REGISTRY)


@every_recurrence
def test_additive_says_what_the_bodies_do(cell):
    """Stage by stage: whether nothing but the sums of its two parts counts."""
    *_, values, params = arguments(cell, 1.0)
    for stage in cell.stages:
        x_gates, received = tiles(len(stage.gates), 1.0), tiles(stage.products, 1.0)
        own, params = params[: len(stage.params)], params[len(stage.params) :]
        new, _ = stage.forward(x_gates, received, values, own)
        moved = tuple(x + 0.5 for x in x_gates), tuple(r - 0.5 for r in received)
        shifted, _ = stage.forward(moved[0], moved[1] if x_gates else received, values, own)
        alike = all(torch.allclose(a, b) for a, b in zip(new, shifted, strict=True))
        assert alike == stage.additive
        values = new


@every_recurrence
def test_bodies_are_pointwise_in_the_unit(cell):
    """A kernel hands a body any tile: a unit's result must not depend on its neighbours. (But for
    the last bits: torch computes the ends of a tensor with other instructions than its middle.)"""
    x_gates, received, state, params = arguments(cell, 1.0)
    whole, _ = forward(cell, x_gates, received, state, params)

    def part(tensors):
        return tuple(t[..., 1:3] for t in tensors)

    piece, _ = forward(cell, part(x_gates), part(received), part(state), part(params))
    for a, b in zip(part(whole), piece, strict=True):
        assert_exact(a, b.detach(), cell.name)


def body_with_a_foreign_name(x_gates, h_gates, state, params):
    return (np.tanh(x_gates[0]),), ()


def body_with_an_import(x_gates, h_gates, state, params):
    import math

    return (math.tanh(x_gates[0]),), ()


def body_with_a_method(x_gates, h_gates, state, params):
    return (x_gates[0].tanh(),), ()


@pytest.mark.parametrize(
    "body", [body_with_a_foreign_name, body_with_an_import, body_with_a_method]
)
def test_a_foreign_name_is_refused(body):
    with pytest.raises(NameError, match=r"uses \['(np|math|.tanh)'.*may use only"):
        check_body(body)
    with pytest.raises(NameError):
        dataclasses.replace(cells.get("rnn_tanh").stages[0], forward=body)


def test_a_cell_must_begin_with_h():
    with pytest.raises(ValueError, match=r"states must start with 'h', got \('c', 'h'\)"):
        dataclasses.replace(cells.get("lstm"), name="x", states=("c", "h"))


def test_a_state_has_a_name_of_its_own():
    with pytest.raises(ValueError, match=r"'x': states must differ, got \('h', 'h'\)"):
        dataclasses.replace(cells.get("lstm"), name="x", states=("h", "h"))


def test_the_first_stage_is_a_product_with_weight_hh():
    with pytest.raises(ValueError, match="'x': expected a first stage of Linear gates"):
        dataclasses.replace(
            cells.get("layer_norm_gru"), name="x", stages=cells.get("layer_norm_gru").stages[1:]
        )


@pytest.mark.parametrize(
    ("cell", "changes", "message"),
    [
        ("peephole_lstm_full", {"stages": slice(None, None, -1)}, "a first stage of Linear gates"),
        ("gru_reset_before", {"dense": 0}, "expected Linear stages before Dense ones"),
        (
            "mlp_transition",
            {"states": ("h", "c")},
            "expected h alone, .* where stages have a width",
        ),
        ("gru_reset_before", {"width": 8}, "expected h alone, .* where stages have a width"),
    ],
)
def test_what_dense_stages_stand_beside(cell, changes, message):
    cell, changes = cells.get(cell), dict(changes)
    stages = list(cell.stages)
    if "dense" in changes:
        dense = dataclasses.replace(stages[1], receives=cells.Dense(("weight_mlp1",)))
        stages = [stages[0], dense, stages[1]]
    elif "width" in changes:
        wide = dataclasses.replace(stages[1].receives, width=changes["width"])
        stages = [stages[0], dataclasses.replace(stages[1], receives=wide)]
    elif "stages" in changes:
        stages = stages[changes["stages"]]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(
            cell, name="x", stages=tuple(stages), states=changes.get("states", cell.states)
        )


def test_a_compiler_sees_a_cell_that_nobody_has_asked_yet():
    """What follows from the stages is worked out at once: it cannot look into a cached property."""
    cell = dataclasses.replace(cells.get("lstm"), name="asked_first_by_a_compiler")

    def numbers(x):
        return x + len(cell.gates) + len(cell.saved) + len(cell.params) + len(cell.weighted)

    compiled = torch.compile(numbers, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())) == 4 + len(cell.saved) + 0 + 1


@pytest.mark.parametrize("count", [0, 7])
def test_the_number_of_stages(count):
    stage = cells.get("rnn_tanh").stages[0]
    with pytest.raises(ValueError, match=f"'x': expected 1 to 6 stages, got {count}"):
        dataclasses.replace(cells.get("rnn_tanh"), name="x", stages=(stage,) * count)


def test_a_diagonal_cell_has_one_stage():
    """Nothing is exchanged then, and so there is nothing to wait for."""
    diagonal, dense = (cells.get(name).stages[0] for name in ("indrnn_tanh", "rnn_tanh"))
    for stages in ((diagonal, diagonal), (dense, diagonal)):
        with pytest.raises(ValueError, match="'x': expected one stage, being diagonal, got 2"):
            dataclasses.replace(cells.get("indrnn_tanh"), name="x", stages=stages)


def test_a_cell_with_other_options():
    """It has a name that says them, by which any process finds it."""
    make = cells.layer_norm_gru.layer_norm_gru
    assert make() is make(eps=1e-3) is cells.get("layer_norm_gru")
    cell = make(eps=1e-5)
    assert cell.name == "layer_norm_gru(eps=1e-05, update_bias=-1.0)"
    assert cells.get(cell.name) is make(eps=1e-5, update_bias=-1.0) is cell
    found = subprocess.run(
        [sys.executable, "-c", f"from fusedrnn import cells; print(cells.get({cell.name!r}).name)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == cell.name


@pytest.mark.parametrize(
    "name",
    ["layer_norm_gru(", "layer_norm_gru(x=1)", "layer_norm_gru(eps=x)", "gru(eps=1)", "(", []],
)
def test_options_that_there_are_not(name):
    with pytest.raises(ValueError, match="cell must be one of"):
        cells.get(name)


def test_the_options_reach_the_bodies():
    make = cells.layer_norm_gru.layer_norm_gru
    for option, other in (("eps", 0.5), ("update_bias", 1.0)):
        state = (torch.randn(3, 5).double(),)
        sums = tuple(torch.randn(3, 5).double() for _ in range(3))
        results = []
        for cell in (make(), make(**{option: other})):
            first, second = cell.stages
            values, _ = first.forward(sums, sums, state, ())
            means = tuple(v.mean(-1, keepdim=True) for v in values[:2])
            params = tuple(torch.ones(5).double() for _ in cell.params)
            results.append(second.forward((), means, values, params)[0][0])
        assert not torch.allclose(*results)


def body_around(around):
    def body(x_gates, h_gates, state, params):
        return (x_gates[0] * around,), ()

    return body


def test_what_is_around_a_body_are_numbers():
    check_body(body_around(2.0))
    with pytest.raises(NameError, match=r"uses \['around'\]"):
        check_body(body_around("2.0"))


@pytest.mark.parametrize("name", ["Peephole", "peep hole", "2x", ""])
def test_a_name_is_a_lower_case_identifier(name):
    with pytest.raises(ValueError, match=f"expected a lower-case identifier .* got {name!r}"):
        cells.register(dataclasses.replace(cells.get("lstm"), name=name))
    assert name not in cells.REGISTRY


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'lstm' is registered already"):
        cells.register(cells.get("lstm"))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"\['coupled_lstm', 'gru', .*got 'lstn'"):
        cells.get("lstn")

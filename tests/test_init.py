"""fusedrnn.init: what every parameter starts as, and that nothing else was touched."""

import math

import pytest
import torch
from torch import nn

import fusedrnn
from fusedrnn import Recurrent, cells, init

I, H = 4, 6
every_cell = pytest.mark.parametrize("cell", cells.REGISTRY)


def make(cell, **options):
    return Recurrent(cell, I, H, 2, bidirectional=True, **options)


def changed(module, initialise):
    """Names of the parameters that it changed."""
    before = {name: p.clone() for name, p in module.named_parameters()}
    assert initialise(module) is module
    return {n.rpartition("_l")[0] for n, p in module.named_parameters() if not p.equal(before[n])}


def of_gate(module, kind, gate):
    """That gate's part in all layers and directions, one after the other."""
    all_gates = cells.get(module.mode.lower()).gates
    parts = [p for n, p in module.named_parameters() if n.startswith(f"{kind}_l")]
    return torch.cat([p.chunk(len(all_gates))[all_gates.index(gate)] for p in parts])


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("cell", ["rnn_relu", "rnn_tanh", "indrnn_relu"])
def test_identity_keeps_the_state(cell, heads):
    module = make(cell, num_heads=heads)
    assert changed(module, init.identity_) == {"weight_hh", "bias_ih", "bias_hh"}
    h = torch.rand(4, 3, H) / 8
    layer = module(torch.zeros(1, 3, I), h)[1][:2]
    torch.testing.assert_close(layer, torch.tanh(h[:2]) if "tanh" in cell else h[:2])
    init.identity_(module, 0.5)
    half = module(torch.zeros(1, 3, I), h)[1][:2]
    torch.testing.assert_close(half, torch.tanh(h[:2] / 2) if "tanh" in cell else h[:2] / 2)


@every_cell
@pytest.mark.parametrize("heads", [1, 2])
def test_orthogonal_blocks(cell, heads):
    if cells.get(cell).diagonal:
        with pytest.raises(ValueError, match=f"expected a matrix weight_hh, {cell} has a vector"):
            init.orthogonal_(make(cell))
        return
    heads = 1 if cells.get(cell).widest else heads
    module = make(cell, num_heads=heads)
    assert changed(module, lambda m: init.orthogonal_(m, 2.0)) == {"weight_hh"}
    if cells.get(cell).widest:  # of more rows than columns
        found = module.weight_hh_l1.T @ module.weight_hh_l1
        torch.testing.assert_close(found, 4 * torch.eye(H))
        return
    for name, weight in module.named_parameters():
        if name.startswith("weight_hh"):
            size = H // heads
            blocks = weight.reshape(-1, size, size)
            assert len(blocks) == heads * len(cells.get(cell).gates)
            products = blocks @ blocks.mT
            torch.testing.assert_close(products, 4 * torch.eye(size).expand_as(products))


@every_cell
def test_the_forget_bias_is_what_the_gate_opens_with(cell):
    if cells.get(cell).gates in (("h",), ("m",)):
        with pytest.raises(ValueError, match=f"expected one of .*, got {cell}"):
            init.forget_bias_(make(cell))
        return
    module = make(cell)
    keeps, writes = init.GATES[cell]
    expected = {"bias_ln"} if cell == "layer_norm_gru" else {"bias_ih", "bias_hh"}
    assert changed(module, lambda m: init.forget_bias_(m, 3.0)) == expected
    total = sum(of_gate(module, kind, keeps or writes) for kind in expected)
    torch.testing.assert_close(total, torch.full_like(total, 3.0 if keeps else -3.0))


@pytest.mark.parametrize("cell", init.GATES)
def test_which_gate_keeps_is_what_the_cell_does(cell):
    """With the gate wide open, and nothing else: the state stays, in every layer."""
    module = Recurrent(cell, I, H, dtype=torch.float64)
    for p in module.parameters():
        nn.init.zeros_(p)
    init.forget_bias_(module, 60.0)
    states = cells.get(cell).states
    hx = tuple(torch.rand(1, 2, H, dtype=torch.float64) + 1 for _ in states)
    with torch.no_grad():
        _, final = module(torch.zeros(1, 2, I, dtype=torch.float64), hx if len(hx) > 1 else hx[0])
    kept, before = (final[1], hx[1]) if len(hx) > 1 else (final, hx[0])
    torch.testing.assert_close(kept, before)


@pytest.mark.parametrize("cell", init.GATES)
def test_chrono_spreads_times(cell):
    torch.manual_seed(0)
    module = Recurrent(cell, I, 500)
    keeps, writes = init.GATES[cell]
    kinds = ["bias_ln"] if cell == "layer_norm_gru" else ["bias_ih", "bias_hh"]
    init.chrono_(module, 100)
    keep = sum(of_gate(module, kind, keeps or writes) for kind in kinds) * (1 if keeps else -1)
    times = keep.exp()
    assert 1 <= times.min() < 5
    assert 95 < times.max() <= 99
    # The mean of a uniform variable, within four of its standard errors.
    assert abs(times.mean() - 50) < 4 * 98 / math.sqrt(12 * 500)
    if keeps and writes:
        torch.testing.assert_close(sum(of_gate(module, k, writes) for k in kinds), -keep)


def test_modules_of_torch_too():
    module = init.chrono_(init.orthogonal_(nn.LSTM(I, H)), 10)
    assert (module.bias_hh_l0[: 2 * H] == 0).all()
    assert type(module) is nn.LSTM


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: init.identity_(fusedrnn.LSTM(I, H)), "without gates, RNN or IndRNN, got lstm"),
        (lambda: init.identity_(nn.Linear(2, 2)), "expected a recurrent module.* got Linear"),
        (lambda: init.identity_(fusedrnn.RNN(I, H), "1"), "scale: expected a number, got str"),
        (lambda: init.orthogonal_(fusedrnn.RNN(I, H), math.nan), "gain: expected a finite number"),
        (lambda: init.chrono_(fusedrnn.GRU(I, H), 2), "longest: expected more than 2 .* got 2"),
        (lambda: init.chrono_(fusedrnn.GRU(I, H, bias=False), 9), "expected bias=True"),
        (lambda: init.forget_bias_(fusedrnn.RNN(I, H)), "expected one of .* got rnn_tanh"),
    ],
)
def test_misuse(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()

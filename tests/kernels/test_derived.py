"""A derived cell in the interpreted kernels: three states, parameters; and two stages."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import steps
import torch
import torch.nn.functional as F
from layer_checks import precision
from tolerances import GRADIENTS32, VALUES32

import fusedrnn
from fusedrnn.cells import vocabulary


def run(rnn, input, d_output):
    """Output, final states and all gradients."""
    output, final = rnn(input)
    final = final if isinstance(final, tuple) else (final,)
    gradients = torch.autograd.grad(
        [output, *final], [input, *rnn.parameters()], [d_output, *final]
    )
    return [output, *final], gradients


def loop(rnn, x, states):
    """One layer of `steps.normalized`, step by step."""
    state = [torch.zeros(x.shape[1], 7, dtype=x.dtype) for _ in states]
    params = SimpleNamespace(w_i=rnn.w_i_l0, w_f=rnn.w_f_l0)
    outputs = []
    for x_t in x:
        gates = F.linear(x_t, rnn.weight_ih_l0, rnn.bias_ih_l0).chunk(3, -1)
        hidden = F.linear(state[0], rnn.weight_hh_l0, rnn.bias_hh_l0).chunk(3, -1)
        named = [SimpleNamespace(**dict(zip("ifz", g, strict=True))) for g in (gates, hidden)]
        before = SimpleNamespace(**dict(zip(states, state, strict=True)))
        state = steps.normalized(*named, before, params)
        outputs.append(state[0])
    return torch.stack(outputs), tuple(s[None] for s in state)


@pytest.mark.parametrize("save", ["gates", "states"])
def test_three_states_and_parameters(save):
    cell = fusedrnn.cell(**steps.NORMALIZED)(steps.normalized)
    rnn = fusedrnn.Recurrent(cell, 5, 7, backend="triton", save=save)
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.normal_(std=0.5)
    input, d_output = torch.randn(4, 3, 5, requires_grad=True), torch.randn(4, 3, 7)
    with precision(tf32=False):
        found, gradients = run(rnn, input, d_output)

    rnn.double()
    exact = input.detach().double().requires_grad_()
    output, final = loop(rnn, exact, cell.states)
    d_final = [f.detach().double() for f in found[1:]]
    expected = torch.autograd.grad(
        [output, *final], [exact, *rnn.parameters()], [d_output.double(), *d_final]
    )
    for a, b in zip(found, (output, *final), strict=True):
        torch.testing.assert_close(a.double(), b, **VALUES32)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a.double(), b, **GRADIENTS32)


def test_two_stages_are_those_written_by_hand():
    def of_two_stages(*given):
        return steps.gru_reset_before(*given)

    cell = fusedrnn.cell(gates=(("r", "z"), ("n",)), states=("h",))(of_two_stages)
    input, d_output = torch.randn(3, 2, 5, requires_grad=True), torch.randn(3, 2, 14)
    results = []
    for which in (cell, "gru_reset_before"):
        torch.manual_seed(1)
        rnn = fusedrnn.Recurrent(which, 5, 7, backend="triton", bidirectional=True)
        results.append(run(rnn, input, d_output))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **GRADIENTS32)


def test_every_function_compiles():
    """As Triton's compiler sees it, which knows less of Python than its interpreter."""
    pytest.importorskip("triton.backends.nvidia")
    cell = fusedrnn.cell(gates=("u", "v"), states=("h",), params=("w",))(steps.everything)
    text = inspect.getsource(cell.stages[0].forward) + inspect.getsource(cell.stages[0].backward)
    assert all(f"{name}(" in text for name in vocabulary.NAMES)
    root = Path(__file__).parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{root}{os.pathsep}{root / 'tests'}"
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_derived.py")],
        capture_output=True, text=True, env=environment, cwd=root, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == {"forward": [], "backward": []}

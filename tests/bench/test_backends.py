import sys
from types import SimpleNamespace

import pytest
import torch

from bench import backends
from bench.backends import Problem
from bench.run import deviation
from bench.shapes import PASSES, Shape
from bench.timing import Device

PLAIN = Shape("lstm", "fp32-exact", 5, 3, 6, 8)
SHAPES = [
    PLAIN,
    Shape("gru", "fp32-exact", 5, 3, 6, 8),
    Shape("rnn_tanh", "fp32-exact", 5, 3, 6, 8, 2, True),
    Shape("lstm", "fp32-exact", 5, 3, 6, 8, 2, True, "text"),
    Shape("gru", "fp32-exact", 5, 3, 6, 8, resets=True),
    Shape("lstm", "fp32-exact", 1, 1, 6, 8),
    Shape("lstm", "bf16", 5, 3, 6, 8),
]


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.key)
def test_everyone_computes_the_same(shape, pass_, gpu):
    for n, name in enumerate(backends.WHAT):
        if backends.refuses(name, shape, gpu):
            assert name != "torch_nn"
            continue
        problem = Problem(shape, "cpu", sets=2, gradients=pass_ == "training")
        runner = backends.build(name, problem, pass_, gpu)
        results = runner.run(0)
        assert set(runner.names) == set(problem.answer())
        error, where = deviation(runner, results, problem.answer())
        assert error < (3e-2 if shape.dtype == "bf16" else 1e-5), (name, where)
        if n == 0:
            other = runner.run(1)[0]
            assert other.shape != results[0].shape or not torch.equal(other, results[0])


def test_a_problem_is_the_same_every_time():
    first, second = Problem(PLAIN, "cpu"), Problem(PLAIN, "cpu")
    for name, weight in first.weights.items():
        assert torch.equal(weight, second.weights[name])
    assert torch.equal(first.inputs[1].leaf, second.inputs[1].leaf)
    assert not torch.equal(first.inputs[0].leaf, first.inputs[1].leaf)


def test_auto_says_what_it_ran_on(gpu):
    problem = Problem(PLAIN, "cpu")
    assert backends.build("auto", problem, "training", gpu).ran_on == "aten"
    assert backends.build("reference", problem, "training", gpu).ran_on == "reference"


def test_a_cpu_says_why_not():
    cpu = Device()
    assert "CUDA" in backends.refuses("torch_nn_graph", PLAIN, cpu)
    assert "not installed" in backends.refuses("haste", PLAIN, cpu)
    long = Shape("lstm", "bf16", 2048, 3, 6, 8)
    assert "minutes" in backends.refuses("reference_compile", long, cpu)
    with pytest.raises(ValueError, match="torch_nn"):
        backends.refuses("cudnn", PLAIN, cpu)


def flashrnn_as_documented(Wx, R, b, states=None, function="lstm", backend="", dtype=""):
    """FlashRNN's recurrence, from its documentation: [B, T, G, N, D] -> [S, B, T, N, D].

    R is [G, N, D, D], the row being the new unit.
    """
    B, T, _, N, D = Wx.shape
    assert dtype == str(Wx.dtype).removeprefix("torch.")
    count = 2 if function == "lstm" else 1
    h, *rest = (Wx.new_zeros(B, N, D) for _ in range(count))
    steps = []
    for t in range(T):
        x = Wx[:, t]
        r = torch.einsum("gnij,bnj->bgni", R, h)
        if function == "lstm":
            i, f, z, o = (x + r + b).unbind(1)
            rest = [f.sigmoid() * rest[0] + i.sigmoid() * z.tanh()]
            h = o.sigmoid() * rest[0].tanh()
        elif function == "gru":
            inner = r[:, 0] + b[0]
            reset = (x[:, 0] + r[:, 1] + b[1]).sigmoid()
            update = (x[:, 1] + r[:, 2] + b[2]).sigmoid()
            h = update * h + (1 - update) * (x[:, 2] + b[3] + reset * inner).tanh()
        else:
            h = (x + r + b)[:, 0].tanh()
        steps.append(torch.stack([h, *rest]))
    everything = torch.stack(steps, dim=2)
    return everything, everything[:, :, -1:]


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_the_flashrnn_adapter_maps_weights_and_layouts(cell, monkeypatch, gpu):
    module = SimpleNamespace(flashrnn=flashrnn_as_documented)
    monkeypatch.setitem(sys.modules, "flashrnn", module)
    problem = Problem(Shape(cell, "fp32-exact", 5, 3, 6, 8), "cpu")
    runner = backends.build("flashrnn_alternating", problem, "training", gpu)
    answer = problem.answer()
    results = runner.run(0)
    assert runner.names == (*answer,)[: len(runner.names)]
    assert "d_input" in runner.names
    assert deviation(runner, results, answer)[0] < 1e-5


class HasteLayer(torch.nn.Module):
    """haste's LSTM layer as documented: it takes torch's weights, gives output and final state."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.inner = torch.nn.LSTM(input_size, hidden_size)

    def from_native_weights(self, *weights):
        with torch.no_grad():
            for own, given in zip(self.inner.parameters(), weights, strict=True):
                own.copy_(given)

    def forward(self, input):
        return self.inner(input)


def test_the_haste_adapter(monkeypatch, gpu):
    monkeypatch.setitem(sys.modules, "haste_pytorch", SimpleNamespace(LSTM=HasteLayer))
    problem = Problem(PLAIN, "cpu")
    runner = backends.build("haste", problem, "training", gpu)
    assert deviation(runner, runner.run(0), problem.answer())[0] < 1e-5


def test_stepwise_resets_a_row():
    inner = torch.nn.GRU(2, 3)
    x = torch.randn(4, 2, 2)
    reset = torch.zeros(4, 2, dtype=torch.bool)
    reset[2, 0] = True
    output, _ = backends.Stepwise(inner)(x, reset=reset)
    fresh, _ = inner(x[2:, :1])
    torch.testing.assert_close(output[2:, :1], fresh)
    whole, _ = inner(x[:, 1:])
    torch.testing.assert_close(output[:, 1:], whole)


def test_the_compiled_loop_is_compiled(gpu):
    problem = Problem(PLAIN, "cpu")
    graphs = []

    def spy(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    gpu.compiles = spy
    backends.build("reference_compile", problem, "inference", gpu).run(0)
    assert graphs
    used = {str(node.target) for node in graphs[0].graph.nodes}
    assert any("linear" in name for name in used), used

"""ONNX with the standard operators, torch.export with dynamic shapes, AOTInductor."""

import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from tolerances import VALUES32
from torch.export import Dim

import fusedrnn
import fusedrnn.onnx

T, B, I, H = 4, 2, 3, 5
TIME, BATCH = Dim("time"), Dim("batch")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def states(hx):
    return hx if isinstance(hx, tuple) else (hx,)


class WithLengths(torch.nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, lengths):
        return self.rnn(x, lengths=lengths)


def exported(model, args, shapes, path):
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        fusedrnn.onnx.export(model, args, path, dynamic_shapes=shapes, verbose=False)
    graph = onnx.load(path).graph
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*inputs):
        names = [value.name for value in session.get_inputs()]
        assert len(names) == len(inputs)
        feed = {n: t.numpy() for n, t in zip(names, inputs, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feed)]

    return graph, run


def assert_same(found, result):
    for one, other in zip(found, (result[0], *states(result[1])), strict=True):
        # Two implementations in float32, a few steps: a few roundings of values below 1.
        torch.testing.assert_close(one, other.detach(), **VALUES32)


CASES = {
    "LSTM": lambda: fusedrnn.LSTM(I, H, 2, bidirectional=True),
    "GRU": lambda: fusedrnn.GRU(I, H, 2, bidirectional=True, batch_first=True),
    "RNN": lambda: fusedrnn.RNN(I, H, bidirectional=True, nonlinearity="relu"),
    "GRU without bias": lambda: fusedrnn.GRU(I, H, bias=False),
    "GRU, reset before": lambda: fusedrnn.Recurrent(
        "gru_reset_before", I, H, 2, bidirectional=True
    ),
    "LSTM by its cell": lambda: fusedrnn.Recurrent("lstm", I, H),
}


@pytest.mark.parametrize("name", CASES)
def test_onnx(name, tmp_path):
    module = CASES[name]().eval()
    swap = module.batch_first
    x = torch.randn(B, T, I) if swap else torch.randn(T, B, I)
    shapes = {"input": {0: BATCH, 1: TIME} if swap else {0: TIME, 1: BATCH}}
    graph, run = exported(module, (x,), shapes, str(tmp_path / "model.onnx"))
    operators = [node.op_type for node in graph.node]
    assert operators.count(re.match("[A-Z]+", name)[0]) == module.num_layers
    assert not {node.domain for node in graph.node} - {""}  # standard operators only
    assert "Gather" not in operators  # the weights are stored in ONNX's order
    for shape in ((T, B, I), (9, 3, I), (1, 1, I)):
        x = torch.randn(shape)
        assert_same(run(x), module(x))


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before"])
def test_onnx_with_lengths(cell, tmp_path):
    model = WithLengths(fusedrnn.Recurrent(cell, I, H, bidirectional=True)).eval()
    args = (torch.randn(T, B, I), torch.tensor([4, 2]))
    shapes = {"x": {0: TIME, 1: BATCH}, "lengths": {0: BATCH}}
    _, run = exported(model, args, shapes, str(tmp_path / "model.onnx"))
    x, lengths = torch.randn(7, 3, I), torch.tensor([2, 7, 5])
    assert_same(run(x, lengths), model(x, lengths))


class WithStateAndLengths(WithLengths):
    def forward(self, x, hx, lengths):
        return self.rnn(x, hx, lengths=lengths)


@pytest.mark.parametrize("cls", [fusedrnn.LSTM, fusedrnn.GRU, fusedrnn.RNN])
def test_onnx_keeps_the_state_of_a_row_without_steps(cls, tmp_path):
    model = WithStateAndLengths(cls(I, H, bidirectional=True)).eval()

    def state(B):
        parts = [torch.randn(2, B, H) for _ in range(2 if cls is fusedrnn.LSTM else 1)]
        return tuple(parts) if len(parts) > 1 else parts[0]

    of_state = ({1: BATCH}, {1: BATCH}) if cls is fusedrnn.LSTM else {1: BATCH}
    shapes = {"x": {0: TIME, 1: BATCH}, "hx": of_state, "lengths": {0: BATCH}}
    args = (torch.randn(T, B, I), state(B), torch.tensor([4, 2]))
    _, run = exported(model, args, shapes, str(tmp_path / "model.onnx"))
    x, hx, lengths = torch.randn(7, 3, I), state(3), torch.tensor([2, 0, 7])
    assert_same(run(x, *states(hx), lengths), model(x, hx, lengths))


def test_onnx_with_a_state(tmp_path):
    module = fusedrnn.LSTM(I, H).eval()
    x, hx = torch.randn(T, B, I), (torch.randn(1, B, H), torch.randn(1, B, H))
    shapes = {"input": {0: TIME, 1: BATCH}, "hx": ({1: BATCH}, {1: BATCH})}
    _, run = exported(module, (x, hx), shapes, str(tmp_path / "model.onnx"))
    assert_same(run(x, *hx), module(x, hx))


@pytest.mark.parametrize(
    ("module", "call", "message"),
    [
        (fusedrnn.LSTM(I, H, proj_size=2), {}, "no operator for projections"),
        (fusedrnn.GRU(I, H, zoneout=0.1), {}, "regularisers inside the loop"),
        (fusedrnn.GRU(I, H, num_heads=H), {}, "no operator for heads"),
        (fusedrnn.GRU(I, H), {"reset": torch.zeros(T, B, dtype=torch.bool)}, "for resets"),
    ],
    ids=["projection", "zoneout", "heads", "reset"],
)
def test_what_onnx_has_not(module, call, message, tmp_path):
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception, match=message) as error:
            fusedrnn.onnx.export(
                module.eval(), (torch.randn(T, B, I),), str(tmp_path / "m.onnx"), kwargs=call
            )
    assert isinstance(error.value, torch.onnx.OnnxExporterError)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls", [fusedrnn.LSTM, fusedrnn.GRU, fusedrnn.RNN])
def test_torch_export_with_dynamic_shapes(cls, training, tmp_path):
    module = cls(I, H, 2, bidirectional=True).train(training)
    x = torch.randn(T, B, I)
    program = torch.export.export(module, (x,), dynamic_shapes={"input": {0: TIME, 1: BATCH}})
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("fusedrnn.stack.default") == 1
    torch.export.save(program, tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2")
    x = torch.randn(9, 5, I)
    found, expected = program.module()(x), module(x)
    # Layer by layer, not the whole stack at once: oneDNN's LSTM need not give the same bits.
    assert_same((found[0], *states(found[1])), expected)


def fresh_process(code, folder):
    """Runs `code` in a process that knows nothing of us; torch shows its warnings on stderr."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300
    )


def test_loading_a_program_says_what_to_import(tmp_path):
    module, x = fusedrnn.GRU(I, H).eval(), torch.randn(T, B, I)
    torch.save((x, module(x)[0].detach()), tmp_path / "call.pt")
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "ours.pt2")
    fusedrnn.restore_modules(module)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "torchs.pt2")
    code = """{}
import torch
x, expected = torch.load("call.pt")
assert torch.equal(torch.export.load("{}.pt2").module()(x)[0], expected)"""
    without = fresh_process(code.format("", "ours"), tmp_path)
    assert without.returncode != 0
    assert "`import fusedrnn` registers this operator" in without.stderr
    for first, name in (("import fusedrnn", "ours"), ("", "torchs")):
        ran = fresh_process(code.format(first, name), tmp_path)
        assert ran.returncode == 0, ran.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_aot_inductor(tmp_path):
    module = fusedrnn.GRU(I, H, bidirectional=True).eval()
    shapes = {"input": {0: TIME, 1: BATCH}}
    with torch.no_grad():
        program = torch.export.export(module, (torch.randn(T, B, I),), dynamic_shapes=shapes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = torch._inductor.aoti_compile_and_package(
                program, package_path=str(tmp_path / "model.pt2")
            )
        compiled = torch._inductor.aoti_load_package(path)
        x = torch.randn(9, 5, I)
        for one, other in zip(compiled(x), module(x), strict=True):
            assert torch.equal(one, other)
        torch.save((x, module(x)), tmp_path / "call.pt")
    code = """{}
import torch
x, expected = torch.load("call.pt")
found = torch._inductor.aoti_load_package("model.pt2")(x)
assert all(map(torch.equal, found, expected))"""
    ran = fresh_process(code.format("import fusedrnn"), tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "schema for fusedrnn::stack" in fresh_process(code.format(""), tmp_path).stderr

"""torch.onnx.export, by either exporter, writes our modules as it writes those of torch.nn."""

import copy
import warnings

import pytest
import torch
from tolerances import VALUES32
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn
import fusedrnn.onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

T, B, I, H = 4, 2, 3, 5
both_exporters = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "tracing"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Tagger(nn.Module):
    """A recurrent module with something before and after it."""

    def __init__(self, rnn):
        super().__init__()
        self.before, self.rnn = nn.Linear(I, I), rnn
        self.after = nn.Linear(rnn.hidden_size * (2 if rnn.bidirectional else 1), 2)

    def forward(self, x):
        return self.after(self.rnn(self.before(x))[0])


class Packed(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, lengths):
        output, state = self.rnn(pack_padded_sequence(x, lengths))
        return pad_packed_sequence(output)[0], state


class WithLengths(Packed):
    def forward(self, x, lengths):
        return self.rnn(x, lengths=lengths)


def export(model, args, path, dynamo, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own
        torch.onnx.export(model, args, path, dynamo=dynamo, verbose=False, **options)
    return onnx.load(path).graph


def nodes(graph):
    """Operators with their attributes, in order; names differ."""
    return [
        (node.domain, node.op_type, sorted(map(onnx.helper.printable_attribute, node.attribute)))
        for node in graph.node
    ]


def run(path, *args):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    feed = {name: arg.numpy() for name, arg in zip(names, args, strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, feed)]


def assert_exported_as_torchs(model, args, others, tmp_path, dynamo, **options):
    """`model` of torch.nn's and the same of ours: one graph, which gives our numbers."""
    ours = copy.deepcopy(model)
    assert fusedrnn.replace_modules(ours).swapped
    path = str(tmp_path / "ours.onnx")
    expected = nodes(export(model, args, str(tmp_path / "torch.onnx"), dynamo, **options))
    assert nodes(export(ours, args, path, dynamo, **options)) == expected
    for inputs in (args, others):
        flat, results = (torch.utils._pytree.tree_leaves(v) for v in (inputs, ours(*inputs)))
        for found, result in zip(run(path, *flat), results, strict=True):
            # Two implementations in float32, a few steps: a few roundings of values below 1.
            torch.testing.assert_close(found, result.detach(), **VALUES32)


def batch_of(dynamo, names, dims):
    """The options with which `dims`, one for each name, are the batch."""
    if not dynamo:
        return {"input_names": names, "dynamic_axes": dict(zip(names, dims, strict=True))}
    batch = torch.export.Dim("batch")
    return {"dynamic_shapes": [{d: batch for d in dim} for dim in dims]}


@both_exporters
def test_a_module_with_a_state(dynamo, tmp_path):
    model = nn.LSTM(I, H, 2, bidirectional=True, batch_first=True).eval()

    def inputs(B):
        return torch.randn(B, T, I), (torch.randn(4, B, H), torch.randn(4, B, H))

    if dynamo:
        batch = torch.export.Dim("batch")
        options = {"dynamic_shapes": {"input": {0: batch}, "hx": ({1: batch}, {1: batch})}}
    else:
        names = ["x", "h", "c"]
        options = {"input_names": names, "dynamic_axes": {"x": [0, 1], "h": [1], "c": [1]}}
    assert_exported_as_torchs(model, inputs(B), inputs(3), tmp_path, dynamo, **options)


@both_exporters
@pytest.mark.parametrize(
    "rnn",
    [nn.GRU(I, H, bias=False), nn.RNN(I, H, 2, nonlinearity="relu", bidirectional=True)],
    ids=["GRU", "RNN"],
)
def test_inside_a_model(rnn, dynamo, tmp_path):
    others = (torch.randn(T, 3, I),)
    options = batch_of(dynamo, ["x"], [[1]])
    model = Tagger(rnn).eval()
    assert_exported_as_torchs(model, (torch.randn(T, B, I),), others, tmp_path, dynamo, **options)


def test_packed_sequences(tmp_path):
    """By tracing; the other exporter takes none of torch.nn's either."""
    args = (torch.randn(T, B, I), torch.tensor([4, 2]))
    others = (torch.randn(T, 3, I), torch.tensor([4, 3, 1]))
    options = batch_of(False, ["x", "lengths"], [[0, 1], [0]])
    assert_exported_as_torchs(Packed(nn.GRU(I, H)).eval(), args, others, tmp_path, False, **options)


@both_exporters
def test_neither_a_backend_nor_what_rests_in_eval_is_in_the_graph(dynamo, tmp_path):
    x = torch.randn(T, B, I)
    plain, other = (fusedrnn.GRU(I, H, **own).eval() for own in ({}, {
        "backend": "reference", "recurrent_dropout": 0.2, "weight_drop": 0.2, "clip_gradient": 1.0,
    }))  # fmt: skip
    graphs = [export(m, (x,), str(tmp_path / "m.onnx"), dynamo) for m in (plain, other)]
    assert nodes(graphs[0]) == nodes(graphs[1])


def messages(error: BaseException | None) -> str:
    return "" if error is None else f"{error}\n{messages(error.__cause__)}"


@both_exporters
def test_lengths_name_the_way_to_export_them(dynamo, tmp_path):
    model = WithLengths(fusedrnn.GRU(I, H)).eval()
    args = (torch.randn(T, B, I), torch.tensor([4, 2]))
    with pytest.raises((NotImplementedError, torch.onnx.OnnxExporterError)) as error:
        export(model, args, str(tmp_path / "m.onnx"), dynamo)
    assert "call fusedrnn.onnx.export(model" in messages(error.value)


def test_what_onnx_lacks_is_said_by_a_plain_export_too(tmp_path):
    model = fusedrnn.GRU(I, H, zoneout=0.1).eval()
    with pytest.raises(torch.onnx.OnnxExporterError) as error:
        export(model, (torch.randn(T, B, I),), str(tmp_path / "m.onnx"), True)
    assert "ONNX has no operator for regularisers inside the loop" in messages(error.value)


def test_a_cell_that_torch_lacks_names_the_way_to_export_it(tmp_path):
    model = fusedrnn.Recurrent("gru_reset_before", I, H).eval()
    with pytest.raises(torch.onnx.OnnxExporterError) as error:
        export(model, (torch.randn(T, B, I),), str(tmp_path / "m.onnx"), True)
    assert "a cell that torch lacks" in messages(error.value)


@pytest.mark.parametrize("heads", [1, H])
def test_tracing_unrolls_a_cell_that_torch_lacks_and_heads(heads, tmp_path):
    model = fusedrnn.Recurrent("gru_reset_before", I, H, num_heads=heads).eval()
    x, path = torch.randn(T, B, I), str(tmp_path / "m.onnx")
    export(model, (x,), path, False)
    with pytest.warns(torch.jit.TracerWarning, match=f"step by step: the trace holds for T={T}"):
        torch.jit.trace(model, (x,), check_trace=False)
    for found, expected in zip(run(path, x), model(x), strict=True):
        torch.testing.assert_close(found, expected.detach(), **VALUES32)


def test_tracing_unrolls_what_onnx_lacks_whatever_backend_is_forced(tmp_path):
    model = fusedrnn.GRU(I, H, zoneout=0.1, backend="triton").eval()
    x, path = torch.randn(T, B, I), str(tmp_path / "m.onnx")
    export(model, (x,), path, False)
    model.backend = "reference"
    output, h_n = model(x)
    for found, expected in zip(run(path, x), (output, h_n), strict=True):
        torch.testing.assert_close(found, expected.detach(), **VALUES32)


def test_a_program_of_torch_export(tmp_path):
    module, x, path = fusedrnn.GRU(I, H).eval(), torch.randn(T, B, I), str(tmp_path / "m.onnx")
    program = torch.export.export(module, (x,))
    with pytest.raises(torch.onnx.OnnxExporterError) as error:
        export(program, (), path, True)
    assert "call fusedrnn.onnx.export(model" in messages(error.value)
    fusedrnn.onnx.export(program, f=path, verbose=False)
    for found, expected in zip(run(path, x), module(x), strict=True):
        torch.testing.assert_close(found, expected.detach(), **VALUES32)

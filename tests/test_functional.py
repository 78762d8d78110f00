"""The functional interface: the modules' numbers, and an error for whatever does not fit.

Tensors that do not fit each other must not reach a kernel, which would read beyond their end.
"""

import tracemalloc

import pytest
import torch

import fusedrnn
from fusedrnn import functional

T, B, I, H = 7, 3, 6, 5
BACKENDS = [None, "reference"]


def weights(name="LSTM", **options):
    return list(getattr(fusedrnn, name)(I, H, **options).parameters())


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_equals_the_module(name, bias, batch_first, bidirectional):
    layout = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
    module = getattr(fusedrnn, name)(I, H, 2, **layout)
    x = torch.randn(T, B, I)
    for state in (None, module(x)[1]):
        expected = module(x, state)
        function = getattr(functional, name.lower())
        found = function(x, state, module.parameters(), num_layers=2, **layout)
        assert torch.equal(found[0], expected[0])
        one, other = found[1], expected[1]
        if name == "LSTM":
            assert all(map(torch.equal, one, other))
        else:
            assert torch.equal(one, other)


def test_packed_rows_equal_the_module():
    module = fusedrnn.GRU(I, H)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(n, I) for n in (4, 2, 1)])
    found = functional.gru(packed.data, None, module.parameters(), batch_sizes=packed.batch_sizes)
    assert torch.equal(found[0], module(packed)[0].data)
    assert torch.equal(found[1], module(packed)[1])


@pytest.mark.parametrize("training", [False, True])
def test_packed_rows_compile_in_one_graph(training):
    module = fusedrnn.GRU(I, H)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(n, I) for n in (4, 2, 1)])

    def call(data, sizes):
        weights = list(module.parameters())
        return functional.gru(data, None, weights, batch_sizes=sizes, training=training)[0]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(packed.data, packed.batch_sizes), module(packed)[0].data)


X, HX = torch.zeros(T, B, I), torch.zeros(1, B, H)
LSTM, GRU = weights(), weights("GRU")
ROWS = torch.zeros(6, I)
MISUSE = {
    "features": (lambda **o: functional.lstm(X[..., 1:], None, LSTM, **o), "input_size=6, got"),
    "4-D": (lambda **o: functional.lstm(X[None], None, LSTM, **o), "input: expected 2-D or 3-D"),
    "no steps": (lambda **o: functional.lstm(X[:0], None, LSTM, **o), "at least one time step"),
    "integers": (
        lambda **o: functional.lstm(X.long(), None, LSTM, **o),
        r"\(torch.int64\) does not match .*\.to\(torch.float32\)$",
    ),
    "float64": (
        lambda **o: functional.lstm(X.double(), None, LSTM, **o),
        "float64.* does not match .*float32",
    ),
    "batch of hx": (
        lambda **o: functional.lstm(X, (HX[:, :1],) * 2, LSTM, **o),
        r"hx \(h_0\): expected shape \(1, 3, 5\) .* got \(1, 1, 5\)",
    ),
    "layers of hx": (
        lambda **o: functional.gru(X, HX.expand(3, B, H), GRU, **o),
        r"hx \(h_0\): expected shape \(1, 3, 5\) .* got \(3, 3, 5\)",
    ),
    "width of c_0": (
        lambda **o: functional.lstm(X, (HX, HX[..., :1]), LSTM, **o),
        r"hx \(c_0\): expected shape",
    ),
    "one state": (lambda **o: functional.lstm(X, HX, LSTM, **o), "hx: expected the 2 tensors"),
    "dtype of hx": (lambda **o: functional.gru(X, HX.double(), GRU, **o), r"hx \(h_0\): expected"),
    "no weights": (lambda **o: functional.lstm(X, None, [], **o), "weights: expected 4 .* got 0"),
    "two layers": (lambda **o: functional.lstm(X, None, LSTM * 2, **o), "expected 4 .* got 8"),
    "one layer": (
        lambda **o: functional.lstm(X, None, LSTM, num_layers=2, **o),
        "expected 8 tensors for 2 layer",
    ),
    "one direction": (
        lambda **o: functional.lstm(X, None, LSTM, bidirectional=True, **o),
        "expected 8 tensors",
    ),
    "no bias": (lambda **o: functional.lstm(X, None, LSTM, bias=False, **o), "expected 2 tensors"),
    "another cell": (
        lambda **o: functional.gru(X, None, LSTM, **o),
        r"weights\[0\]: expected shape",
    ),
    "hidden_size": (
        lambda **o: functional.lstm(X, None, LSTM, hidden_size=9, **o),
        r"weights\[0\]: expected shape \(36, 6\) for hidden_size=9, got \(20, 6\)",
    ),
    "a weight": (
        lambda **o: functional.lstm(X, None, [*LSTM[:1], LSTM[1][:, 1:], *LSTM[2:]], **o),
        r"weights\[1\]: expected shape \(20, 5\) .* got \(20, 4\)",
    ),
    "a dtype": (
        lambda **o: functional.lstm(X, None, [*LSTM[:3], LSTM[3].double()], **o),
        r"weights\[3\]: expected one floating-point dtype for all, got torch.float64",
    ),
    "integer weights": (
        lambda **o: functional.lstm(X.long(), None, [w.long() for w in LSTM], **o),
        r"weights\[0\]: expected one floating-point dtype",
    ),
    "no tensor": (
        lambda **o: functional.lstm(X, None, [*LSTM[:3], None], **o),
        r"weights\[3\]: expected a Tensor, got NoneType",
    ),
    "save": (
        lambda **o: functional.lstm(X, None, LSTM, save="all", **o),
        r"save: expected one of \('gates', 'states'\), got 'all'",
    ),
    "rows": (
        lambda **o: functional.gru(ROWS, None, GRU, batch_sizes=torch.tensor([3, 2]), **o),
        "batch_sizes: .* 6 in all",
    ),
    "order": (
        lambda **o: functional.gru(ROWS, None, GRU, batch_sizes=torch.tensor([2, 4]), **o),
        "batch_sizes: .* never increasing",
    ),
    "kind": (
        lambda **o: functional.gru(ROWS, None, GRU, batch_sizes=torch.tensor([3.0, 3.0]), **o),
        "batch_sizes: expected a tensor .* int64 on the CPU, got torch.float32",
    ),
    "list": (
        lambda **o: functional.gru(ROWS, None, GRU, batch_sizes=[3, 3], **o),
        "batch_sizes: .* got list",
    ),
    "empty": (
        lambda **o: functional.gru(
            ROWS, None, GRU, batch_sizes=torch.empty(0, dtype=torch.int64), **o
        ),
        r"batch_sizes: .* got shape \(0,\)",
    ),
    "bidirectional": (
        lambda **o: functional.lstm(X, None, LSTM * 2, bidirectional=2, **o),
        "lstm: bidirectional: expected a bool, got 2",
    ),
    "an option": (
        lambda **o: functional.lstm(X, None, LSTM, bogus=1, **o),
        r"lstm: unexpected options \['bogus'\], may be \['backend', 'batch_first'",
    ),
    "weights": (
        lambda **o: functional.lstm(X, None, None, **o),
        "weights: expected an iterable of Tensors, got NoneType",
    ),
    "no tensors": (
        lambda **o: functional.lstm(X, None, [3, 4], **o),
        r"weights\[0\]: expected a Tensor, got int",
    ),
    "regularizers": (
        lambda **o: functional.lstm(X, None, LSTM, regularizers={"zoneout": 0.1}, **o),
        "regularizers: expected fusedrnn.Regularizers or None, got dict",
    ),
    "projection of gru": (
        lambda **o: functional.gru(
            X, None, [GRU[0], GRU[1][:, :2], *GRU[2:], torch.zeros(2, H)], proj_size=2, **o
        ),
        "proj_size: expected 0, since only lstm, coupled_lstm, peephole_lstm, slstm can project, "
        "got 2 for gru",
    ),
    "nonlinearity": (
        lambda **o: functional.rnn(X, None, weights("RNN"), nonlinearity="sin", **o),
        "nonlinearity: expected 'tanh' or 'relu', got 'sin'",
    ),
    "cell": (
        lambda **o: functional.recurrent("elman", X, None, LSTM, hidden_size=H, **o),
        "cell must be one of",
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MISUSE)
def test_misuse(name, backend):
    call, message = MISUSE[name]
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        call(backend=backend)


def test_a_wrong_number_of_layers_costs_no_memory():
    tracemalloc.start()
    with pytest.raises(RuntimeError, match="expected 400000 tensors for 100000 layer"):
        functional.lstm(X, None, LSTM, num_layers=100_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_an_unknown_backend():
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'cudnn'"):
        functional.lstm(X, None, LSTM, backend="cudnn")
    module = fusedrnn.LSTM(I, H)
    module.backend = "atem"
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'atem'"):
        module(X)

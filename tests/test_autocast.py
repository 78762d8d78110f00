"""Autocast acts on our modules as on torch.nn's: dtypes and values, eager and compiled."""

import copy
import subprocess
import sys

import pytest
import torch
from tolerances import FLOOR, assert_as_good, assert_same
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves, tree_map

import fusedrnn
from fusedrnn import dispatch

KINDS = {
    "lstm": ("LSTM", {"num_layers": 2, "bidirectional": True}),
    "lstm_projection": ("LSTM", {"proj_size": 2}),
    "gru": ("GRU", {"num_layers": 2, "batch_first": True}),
    "rnn_tanh": ("RNN", {"bidirectional": True}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu", "bias": False}),
}
every_kind = pytest.mark.parametrize("name", KINDS)
low_dtypes = pytest.mark.parametrize(
    "low", [torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch.")
)
layouts = pytest.mark.parametrize("layout", ["padded", "packed", "hx"])
T, B, I, H = 5, 3, 3, 4


def onednn_has_bfloat16():
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            nn.LSTM(I, H)(torch.randn(T, B, I))
    except RuntimeError as error:
        return "could not create a primitive" not in str(error)
    return True


ONEDNN_HAS_BFLOAT16 = onednn_has_bfloat16()


def make(name, *, backend=None):
    kind, options = KINDS[name]
    torchs = getattr(nn, kind)(I, H, **options)
    ours = getattr(fusedrnn, kind)(I, H, **options, backend=backend)
    ours.load_state_dict(torchs.state_dict())
    return torchs, ours


def arguments(module, layout):
    input = torch.randn(*((B, T) if module.batch_first else (T, B)), I)
    if layout == "packed":
        return (pack_padded_sequence(input, [5, 3, 2], module.batch_first),)
    if layout == "hx":
        rows = module.num_layers * (2 if module.bidirectional else 1)
        h_0 = torch.randn(rows, B, module.proj_size or H)
        return input, ((h_0, torch.randn(rows, B, H)) if module.mode == "LSTM" else h_0)
    return (input,)


def results(module, args, low, *, run=None, training=True):
    """Outputs and parameter gradients under autocast to `low` (None: without it)."""
    with torch.autocast("cpu", dtype=low, enabled=low is not None):
        output, final = (module if run is None else run)(*args)
    output = output.data if isinstance(output, PackedSequence) else output
    outputs = [output, *(final if isinstance(final, tuple) else (final,))]
    generator = torch.Generator().manual_seed(2)
    loss = sum((o.double() * torch.randn(o.shape, generator=generator)).sum() for o in outputs)
    if not training:
        return dict(enumerate(outputs))
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    names = ["output", "h_n", "c_n"][: len(outputs)]
    names += [f"d_{n}" for n, _ in module.named_parameters()]
    return dict(zip(names, (*outputs, *gradients), strict=True))


def torchs_results(torchs, args, low, training=True):
    """What torch.nn computes; None where this processor has no kernel for torch's LSTM in `low`."""
    try:
        return results(torchs, args, low, training=training)
    except RuntimeError as error:
        if "could not create a primitive" not in str(error) or torchs.mode != "LSTM":
            raise
        return None


def expected_results(name, torchs, args, low):
    """torch.nn's, or where it has none the reference's."""
    expected = torchs_results(torchs, args, low)
    if expected is not None:
        return expected
    _, reference = make(name, backend="reference")
    reference.load_state_dict(torchs.state_dict())
    return results(reference, args, low)


@every_kind
@low_dtypes
@layouts
def test_eager_is_torchs(name, low, layout):
    """In every bit, but for what torch cannot compute, or only many times as slowly: float16, and
    packed rows of an LSTM."""
    torchs, ours = make(name)
    args = arguments(ours, layout)
    expected, found = expected_results(name, torchs, args, low), results(ours, args, low)
    exact = results(torchs.double(), tree_map(to_double, args), None)
    for key, value in found.items():
        if low == torch.float16 or (name, layout) == ("lstm", "packed") or not ONEDNN_HAS_BFLOAT16:
            assert value.dtype == expected[key].dtype, key
            assert_as_good_low(value, expected[key], exact[key], low, key)
        else:
            assert_same(value, expected[key], key)
    assert found["output"].dtype in (low, torch.float32)


@every_kind
@low_dtypes
@layouts
def test_reference_is_as_good_as_torch(name, low, layout):
    """Its results have the low precision; torch's operators leave some of theirs in float32."""
    torchs, ours = make(name, backend="reference")
    args = arguments(ours, layout)
    plain, found = torchs_results(torchs, args, low), results(ours, args, low)
    if plain is None:  # torch's loop over low-precision tensors, for which it does not take oneDNN
        lower = tree_map(lambda a: to_double(a).to(low) if torch.is_tensor(a) else a, args)
        plain = results(copy.deepcopy(torchs).to(low), lower, None)
        plain = {k: v.float() if k.startswith("d_") else v for k, v in plain.items()}
    exact = results(torchs.double(), tree_map(to_double, args), None)
    for key, value in found.items():
        same = key.startswith("d_")
        assert value.dtype == (torch.float32 if same else low), key
        # torch's error in what it kept in float32 says nothing of a result in `low`.
        rounded = plain[key] if same else plain[key].to(low)
        assert_as_good_low(value, rounded, exact[key], low, key)


def to_double(value):
    """A tensor, or the data of a PackedSequence, in float64; batch_sizes as they are."""
    floating = torch.is_tensor(value) and value.is_floating_point()
    return value.double() if floating else value


def assert_as_good_low(value, plain, exact, low, what):
    """Gradients are float32 numbers of the low precision's accuracy: its floor holds for them."""
    if value.dtype == low:
        assert_as_good(value, plain, exact, what)
    else:
        value, plain = value.double(), plain.double()
        allowed = 2 * (plain - exact).abs().max() + FLOOR[low] * torch.finfo(low).eps * max(
            exact.abs().max().item(), 0.1
        )
        assert (value - exact).abs().max() <= allowed, what


@every_kind
@low_dtypes
def test_compiled_is_torchs(name, low):
    """The op's fake kernel promises the dtypes that torch's operators give, layer by layer."""
    torchs, ours = make(name)
    for layout in ("padded", "hx"):
        torch._dynamo.reset()
        args = arguments(ours, layout)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        expected = expected_results(name, torchs, args, low)
        found = results(ours, args, low, run=compiled)
        for key, value in found.items():
            assert value.dtype == expected[key].dtype, key
            largest = max(expected[key].abs().max().item(), 0.1)
            atol = 4 * FLOOR[low] * torch.finfo(low).eps * largest
            torch.testing.assert_close(value, expected[key], rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
@low_dtypes
def test_cells(kind, low):
    torchs, ours = getattr(nn, kind)(I, H), getattr(fusedrnn, kind)(I, H)
    ours.load_state_dict(torchs.state_dict())
    input = torch.randn(B, I)
    with torch.autocast("cpu", dtype=low):
        expected, found = torchs(input), ours(input)
    for a, b in zip(tree_leaves(found),
                    tree_leaves(expected), strict=True):  # fmt: skip
        assert_same(a, b, kind)


@every_kind
def test_input_of_another_dtype(name):
    """Under autocast, and only there, the input's dtype need not be the parameters'."""
    torchs, ours = make(name)
    (input,) = arguments(ours, "padded")
    input = input.bfloat16()
    with pytest.raises(ValueError, match=r"does not match weight dtype \(torch\.float32\)"):
        ours(input)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(ours(input)[0], torchs(input)[0], "bfloat16 input")


@every_kind
def test_off_inside(name):
    """A disabled region inside an enabled one computes in float32 again."""
    torchs, ours = make(name)
    args = arguments(ours, "padded")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert_same(ours(*args)[0], torchs(*args)[0], "off")
        assert ours(*args)[0].dtype == torch.float32


@low_dtypes
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_where_torchs_lstm_has_no_kernel(low, grad, compiled, monkeypatch):
    """Planted, so that every processor is one without: float32 computes with the rounded values."""
    torchs_lstm, onednns = torch.lstm, torch.ops.aten.mkldnn_rnn_layer

    def lstm(*args):
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("could not create a primitive descriptor")
        return torchs_lstm(*args)

    def layer(input, *args):
        if input.dtype == torch.bfloat16:
            raise RuntimeError("could not create a primitive descriptor")
        return onednns(input, *args)

    monkeypatch.setattr(torch, "lstm", lstm)
    monkeypatch.setattr(torch.ops.aten, "mkldnn_rnn_layer", layer)
    module, input = fusedrnn.LSTM(I, H), torch.randn(T, B, I)
    rounded = copy.deepcopy(module).to(low).float()
    expected = rounded(input.to(low).float())
    torch._dynamo.reset()
    run = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=low):
        found = run(input)
    for value, exact in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert_same(value, exact.to(low), "rounded")


def test_another_error_of_torchs_lstm_is_raised(monkeypatch):
    def lstm(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "lstm", lstm)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="out of"):
        fusedrnn.LSTM(I, H)(torch.randn(T, B, I))


def test_explain_tells_the_dtype():
    module = fusedrnn.LSTM(I, H)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fusedrnn.explain(module, torch.randn(T, B, I)).call.dtype == torch.bfloat16


@low_dtypes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dispatch_is_asked_about_the_dtype_that_will_run(dtype, low, monkeypatch):
    """As `explain` is. Autocast leaves float64 alone."""
    asked, select = [], dispatch.select
    monkeypatch.setattr(dispatch, "select", lambda call: asked.append(call) or select(call))
    module, input = fusedrnn.GRU(I, H, dtype=dtype), torch.randn(T, B, I, dtype=dtype)
    with torch.autocast("cpu", dtype=low):
        module(input, lengths=torch.tensor([5, 3, 2]))
        explained = fusedrnn.explain(module, input, lengths=torch.tensor([5, 3, 2])).call
    expected = low if dtype == torch.float32 else dtype
    assert asked[0].dtype == explained.dtype == expected


@low_dtypes
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("backend", [None, "aten"])
def test_a_cell_runs_on_aten(kind, backend, low):
    cell = getattr(fusedrnn, kind)(I, H, backend=backend)
    with torch.autocast("cpu", dtype=low):
        cell(torch.randn(B, I))
        assert fusedrnn.explain(cell, torch.randn(B, I)).backend == "aten"


INSIDE = {
    "a checkpoint": "checkpoint(lambda x: module(x)[0], x, use_reentrant=False).sum().backward()",
    "a trace": "torch.jit.trace(torch.nn.Sequential(module), x, check_trace=False)",
    "inference mode": "torch.inference_mode()(module)(x)",
    "a fake mode": "FakeTensorMode(allow_non_fake_inputs=True).__enter__(); module(x)",
}


@pytest.mark.parametrize("call", INSIDE)
def test_inside_of(call):
    """In a process of its own, which a mode may leave in any state."""
    code = f"""
import torch, fusedrnn
from torch.utils.checkpoint import checkpoint
from torch._subclasses.fake_tensor import FakeTensorMode
module, x = fusedrnn.LSTM(3, 4), torch.randn(5, 2, 3)
with torch.autocast("cpu", dtype=torch.bfloat16):
    {INSIDE[call]}
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()

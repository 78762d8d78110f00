"""Layers that run backwards in time, inputs added to outputs, layers of several sizes."""

import copy
import pickle

import numpy as np
import pytest
import torch
from tolerances import GRADIENTS32, GRADIENTS64, VALUES64
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn import functional

T, B, I, H = 5, 3, 6, 6
LENGTHS = torch.tensor([2, 5, 3])
STACKS = {
    "reverse": {"hidden_size": H, "direction": "reverse"},
    "alternate": {"hidden_size": H, "direction": "alternate", "residual": True},
    "listed": {"hidden_size": (8, 4, 4), "direction": ["reverse", "reverse", "forward"]},
    "residual": {"hidden_size": 3, "bidirectional": True, "residual": True},
    "narrowing": {"hidden_size": (8, 3, 3), "bidirectional": True, "residual": True},
}
REVERSED = {"reverse": (1, 1, 1), "alternate": (0, 1, 0), "listed": (1, 1, 0)}
every_stack = pytest.mark.parametrize("stack", STACKS)


def make(stack, module="LSTM", **options):
    options = {"num_layers": 3, "dtype": torch.float64, **STACKS[stack], **options}
    return getattr(fusedrnn, module)(I, **options)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def tensors(results):
    packed = lambda r: isinstance(r, PackedSequence)  # noqa: E731
    results = torch.utils._pytree.tree_leaves(results, is_leaf=packed)
    return [r.data if packed(r) else r for r in results]


def assert_close(found, expected, **tolerance):
    found, expected = tensors(found), tensors(expected)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **(tolerance or VALUES64))


def turned(x, lengths):
    """[T, B, *], every row in reverse order up to its length, by Python's own slices."""
    rows = [torch.cat([x[:n, b].flip(0), x[n:, b]]) for b, n in enumerate(lengths.tolist())]
    return torch.stack(rows, 1)


def by_torch(module, x, hx, lengths):
    """The stack by torch.nn's modules of one layer, each on its packed rows."""
    kind, D = getattr(nn, type(module).__name__), 2 if module.bidirectional else 1
    sizes = module.hidden_sizes or (module.hidden_size,) * module.num_layers
    over = (torch.arange(len(x))[:, None] >= lengths)[:, :, None]
    parameters, finals = dict(module.named_parameters()), []
    x = x.masked_fill(over, 0)
    for layer, size in enumerate(sizes):
        one = kind(x.shape[-1], size, bidirectional=D == 2, dtype=x.dtype)
        own = {
            n.replace(f"_l{layer}", "_l0"): p for n, p in parameters.items() if f"_l{layer}" in n
        }
        state = tuple(s[layer * D : (layer + 1) * D, :, :size].contiguous() for s in hx)
        backwards = module.direction != "forward" and REVERSED[stack_of(module)][layer]
        packed = pack_padded_sequence(
            turned(x, lengths) if backwards else x, lengths, enforce_sorted=False
        )
        output, final = torch.func.functional_call(
            one, own, (packed, state if len(state) > 1 else state[0])
        )
        output = pad_packed_sequence(output, total_length=len(x))[0]
        output = turned(output, lengths) if backwards else output
        x = output + x if module.residual and output.shape == x.shape else output
        finals.append([nn.functional.pad(f, (0, max(sizes) - size)) for f in tensors(final)])
    return x, [torch.cat(parts) for parts in zip(*finals, strict=True)]


def stack_of(module):
    given = module.direction
    return next(name for name in REVERSED if tuple(STACKS[name]["direction"]) == tuple(given))


@pytest.mark.parametrize("rows", ["all", "batch_first", "lengths", "packed", "unbatched"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("module", ["LSTM", "GRU"])
@every_stack
def test_as_torchs_layers_one_by_one(stack, module, backend, rows):
    rnn = make(stack, module, backend=backend, batch_first=rows == "batch_first")
    D, count = 2 if rnn.bidirectional else 1, 1 if rows == "unbatched" else B
    lengths = LENGTHS if rows in ("lengths", "packed") else torch.full((count,), T)
    x = double(T, count, I).requires_grad_()
    hx = [double(3 * D, count, rnn.hidden_size).requires_grad_() for _ in range(2)]
    hx = hx[: 2 if module == "LSTM" else 1]
    output, final = by_torch(rnn, x, hx, lengths)
    if rows == "unbatched":
        output, final = output.squeeze(1), [f.squeeze(1) for f in final]
    options = {"lengths": lengths} if rows == "lengths" else {}
    given, state = x, tuple(hx) if len(hx) > 1 else hx[0]
    if rows == "packed":
        given = pack_padded_sequence(x, lengths, enforce_sorted=False)
    elif rows == "batch_first":
        given = x.transpose(0, 1)
    elif rows == "unbatched":
        given = x.squeeze(1)
        state = tuple(h.squeeze(1) for h in hx) if len(hx) > 1 else hx[0].squeeze(1)
    found, found_final = rnn(given, state, **options)
    if rows == "packed":
        found = pad_packed_sequence(found, total_length=T)[0]
    found = found.transpose(0, 1) if rows == "batch_first" else found
    found, expected = tensors([found, found_final]), [output, *final]
    assert_close(found, expected)
    leaves, cotangents = [x, *hx, *rnn.parameters()], [torch.randn_like(e) for e in expected]
    assert_close(
        torch.autograd.grad(found, leaves, cotangents),
        torch.autograd.grad(expected, leaves, cotangents),
        **GRADIENTS64,
    )


@pytest.mark.parametrize("packed", [False, True])
def test_one_reverse_layer_is_the_second_of_two_directions(packed):
    """With all that happens inside the loop."""
    options = {"recurrent_dropout": 0.3, "zoneout": (0.1, 0.2), "dtype": torch.float64}
    both = fusedrnn.LSTM(I, H, bidirectional=True, **options).eval()
    one = fusedrnn.LSTM(I, H, direction="reverse", **options).eval()
    ends = {n: p for n, p in both.state_dict().items() if n.endswith("_reverse")}
    one.load_state_dict({n.removesuffix("_reverse"): p for n, p in ends.items()})
    x, hx = double(T, B, I), (double(2, B, H), double(2, B, H))
    given, extra = x, {"lengths": LENGTHS, "reset": torch.rand(T, B) < 0.4}
    if packed:
        given, extra = pack_padded_sequence(x, LENGTHS, enforce_sorted=False), {}
    output, final, states = both(given, hx, return_states=True, **extra)
    second = tuple(h[1:] for h in hx)
    found, found_final, found_states = one(given, second, return_states=True, **extra)
    expected = tensors(output)[0].chunk(2, -1)[1]
    assert_close([found, found_final], [expected, [f[1:] for f in final]])
    assert_close(found_states, {name: s[1:] for name, s in states.items()})


@every_stack
def test_states_of_all_steps(stack):
    rnn, x = make(stack), double(T, B, I)
    output, (h_n, c_n), states = rnn(x, lengths=LENGTHS, return_states=True)
    assert_close((output, (h_n, c_n)), rnn(x, lengths=LENGTHS))
    D = 2 if rnn.bidirectional else 1
    assert states["h"].shape == states["c"].shape == (3 * D, T, B, rnn.hidden_size)
    for index, (h, c) in enumerate(zip(h_n, c_n, strict=True)):
        layer, second = divmod(index, D)
        backwards = second or (D == 1 and REVERSED[stack][layer])
        last = torch.zeros(B, dtype=torch.int64) if backwards else LENGTHS - 1
        assert_close([states["h"][index, last, range(B)]], [h])
        assert_close([states["c"][index, last, range(B)]], [c])
        size = (rnn.hidden_sizes or (rnn.hidden_size,) * 3)[layer]
        assert states["h"][index, :, :, size:].abs().sum() == 0


@every_stack
def test_derivatives_of_derivatives(stack):
    rnn = make(stack, "GRU")
    parameters = [p.detach().requires_grad_() for p in rnn.parameters()]
    names = [name for name, _ in rnn.named_parameters()]

    def run(x, *values):
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(rnn, given, (x,), {"lengths": [2, 1]})[0]

    x = double(2, 2, I).requires_grad_()
    torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)
    torch.autograd.gradgradcheck(run, (x, *parameters), fast_mode=True)
    per_row = torch.func.vmap(lambda row: rnn(row)[0], in_dims=1, out_dims=1)
    assert_close(per_row(x), rnn(x)[0])


@every_stack
def test_every_backend_draws_the_same_noise(stack):
    """And dropout acts on what enters a layer, not on what is added to its output."""
    options = {"dropout": 0.5, "input_dropout": 0.3, "generator": torch.Generator()}
    rnn, x = make(stack, **options), double(T, B, I)
    results = []
    for backend in ("reference", "aten"):
        rnn.backend = backend
        options["generator"].manual_seed(1)
        results.append(rnn(x))
    assert_close(*results)
    assert not torch.allclose(results[0][0], rnn(x)[0])


def test_what_is_added_has_no_dropout():
    rnn = fusedrnn.GRU(I, I, 2, dropout=1.0, residual=True)
    x = torch.randn(T, B, I)
    first, second = fusedrnn.GRU(I, I), fusedrnn.GRU(I, I)
    for layer, one in enumerate((first, second)):
        own = {n: p for n, p in rnn.state_dict().items() if f"_l{layer}" in n}
        one.load_state_dict({n.replace(f"_l{layer}", "_l0"): p for n, p in own.items()})
    below = first(x)[0] + x
    expected = second(torch.zeros_like(below))[0] + below  # the second layer gets nothing else
    torch.testing.assert_close(rnn(x)[0], expected)


@pytest.mark.parametrize("backend", ["aten", "reference"])
@every_stack
def test_padding_reaches_nothing(stack, backend):
    rnn, x = make(stack, backend=backend), double(T, B, I)
    over = torch.arange(T)[:, None] >= LENGTHS
    expected, _ = rnn(x.masked_fill(over[:, :, None], 0), lengths=LENGTHS)
    dirty = x.masked_fill(over[:, :, None], float("nan")).requires_grad_()
    output, _ = rnn(dirty, lengths=LENGTHS)
    assert_close([output], [expected])
    assert output[over].abs().sum() == 0
    output.sum().backward()
    assert torch.isfinite(dirty.grad).all()
    assert dirty.grad[over].abs().sum() == 0


@pytest.mark.parametrize("stack", ["alternate", "listed"])
def test_compile_and_export(stack):
    rnn, x = make(stack, dtype=torch.float32), torch.randn(T, B, I)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (T, 3):
        found, expected = compiled(x[:count]), rnn(x[:count])
        torch.testing.assert_close(found, expected)
        losses = [output.square().sum() + final[0].sum() for output, final in (found, expected)]
        gradients = [torch.autograd.grad(loss, list(rnn.parameters())) for loss in losses]
        torch.testing.assert_close(*gradients, **GRADIENTS32)
    torch.testing.assert_close(torch.export.export(rnn, (x,)).module()(x), rnn(x))


@every_stack
def test_onnx(stack):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    batch_first = stack in ("alternate", "narrowing")
    lengths = None if stack in ("reverse", "residual") else LENGTHS
    rnn = make(stack, "GRU", dtype=torch.float32, batch_first=batch_first).eval()
    x = torch.randn((B, T, I) if batch_first else (T, B, I))
    given = (x,) if lengths is None else (x, None, lengths)
    program = fusedrnn.onnx.export(rnn, given)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    values = [t.numpy() for t in given if t is not None]
    names = [i.name for i in session.get_inputs()]
    found = session.run(None, dict(zip(names, values, strict=True)))
    for one, other in zip(found, rnn(*given), strict=True):
        torch.testing.assert_close(torch.from_numpy(one), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [6, (6, 4, 4)])
def test_steps_and_streams_are_the_sequence(sizes):
    rnn = fusedrnn.LSTM(I, sizes, 3, residual=True, dtype=torch.float64)
    x, state, outputs = double(T, B, I), None, []
    for x_t in x:
        output, state = rnn.step(x_t, state)
        outputs.append(output)
    expected, final = rnn(x)
    assert_close([torch.stack(outputs), state], [expected, final])
    stream = rnn.stream()
    assert_close([torch.cat([stream(x[:2]), stream(x[2:])]), stream.state], [expected, final])


@every_stack
def test_names_copies_and_repr(stack):
    rnn = make(stack)
    theirs = nn.LSTM(I, H, 3, bidirectional=rnn.bidirectional)
    assert list(rnn.state_dict()) == list(theirs.state_dict())
    sizes = rnn.hidden_sizes or (rnn.hidden_size,) * 3
    for layer, size in enumerate(sizes):
        bound = getattr(rnn, f"weight_hh_l{layer}").abs().max() * size**0.5
        assert 0.7 < bound <= 1  # uniform: of 36 elements or more the largest is less once in 1e5
    for twin in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert repr(twin) == repr(rnn)
        x = double(T, B, I)
        assert_close(twin(x), rnn(x))
    made = eval(f"fusedrnn.{rnn!r}", {"fusedrnn": fusedrnn})  # the options are all there
    assert {n: p.shape for n, p in made.named_parameters()} == {
        n: p.shape for n, p in rnn.named_parameters()
    }
    assert made._spec() == rnn._spec()
    x, given = double(T, B, I), {**STACKS[stack], "num_layers": 3}
    weights = list(rnn.parameters())
    assert_close(functional.recurrent("lstm", x, None, weights, **given), rnn(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "back"}, "direction: expected 'forward', .* got 'back'"),
        ({"direction": ("forward",)}, r"direction: .*\(num_layers=2\), got \('forward',\)"),
        ({"direction": ("forward", "alternate")}, "direction: expected .* got"),
        ({"direction": 1}, "direction: expected .* got 1"),
        ({"direction": "reverse", "bidirectional": True}, "'forward' beside bidirectional=True"),
        ({"direction": np.array(["reverse"] * 2)}, r"direction: expected .* got array\("),
        ({"residual": 1}, "residual: expected a bool, got 1"),
        ({"hidden_size": (4, 4, 4)}, r"hidden_size: .* num_layers=2 layers, got \(4, 4, 4\)"),
        ({"hidden_size": (4, 0)}, r"hidden_size: .* positive .* got \(4, 0\)"),
        ({"hidden_size": (4, 2.5)}, r"hidden_size: expected ints, got \(4, 2.5\)"),
        ({"hidden_size": (4, True)}, r"hidden_size: expected ints, got \(4, True\)"),
        ({"hidden_size": (4, 3), "num_heads": 2}, "num_heads: .* hidden_size=3, got 2"),
        ({"hidden_size": (4, 3), "proj_size": 2}, r"an int beside proj_size=2, got \(4, 3\)"),
    ],
)
def test_misuse(options, message):
    options = {"hidden_size": 4, "num_layers": 2, **options}
    with pytest.raises((TypeError, ValueError), match=message):
        fusedrnn.LSTM(I, **options)
    weights = list(fusedrnn.LSTM(I, 4, 2).parameters())
    with pytest.raises((TypeError, ValueError), match=message):
        functional.recurrent("lstm", torch.randn(T, B, I), None, weights, **options)


@every_stack
def test_what_torch_lacks_is_said_everywhere(stack):
    rnn = make(stack, dtype=torch.float32)
    with pytest.raises(TypeError, match="torch has one size and one direction for all layers"):
        torch.jit.script(rnn)
    assert "one size and one direction" in str(fusedrnn.restore_modules(rnn))
    with pytest.raises(Exception, match=r"direction=, residual=|a program of torch.export"):
        torch.onnx.export(rnn, (torch.randn(T, B, I),), dynamo=True, verbose=False)
    if rnn.bidirectional or any(REVERSED[stack]):
        with pytest.raises(ValueError, match=r"whose layers run forward, got (dir|bid)"):
            rnn.step(torch.randn(B, I))
        with pytest.raises(ValueError, match=r"whose layers run forward, got (dir|bid)"):
            rnn.stream()


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("module", ["GRU", "RNN"])
def test_autocast_compiled_or_not(module, backend):
    """The sum has the dtype of what the layer computed, which a compiler must know beforehand."""
    torch._dynamo.reset()
    rnn = make("alternate", module, dtype=torch.float32, backend=backend)

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return rnn(x)[0] * 2

    x = torch.randn(T, B, I)
    found, expected = torch.compile(run, backend="aot_eager", fullgraph=True)(x), run(x)
    rnn.residual = False
    assert found.dtype == expected.dtype == run(x).dtype
    torch.testing.assert_close(found, expected)


def test_explain_shows_the_sizes():
    told = str(fusedrnn.explain(make("listed"), double(T, B, I)))
    assert "H=(8, 4, 4)" in told
    assert "runs on  aten" in told

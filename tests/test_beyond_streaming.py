"""step and stream: equal to the sequence call, gradients cut where they should be."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from tolerances import GRADIENTS32, GRADIENTS64, VALUES64
from torch.nn.utils import prune

import fusedrnn
from fusedrnn import stack, streaming

T, B, I, H = 12, 3, 4, 5
MODULES = {
    "lstm": fusedrnn.LSTM,
    "lstm-projected": functools.partial(fusedrnn.LSTM, proj_size=3),
    "gru": fusedrnn.GRU,
    "rnn_tanh": fusedrnn.RNN,
    "rnn_relu": functools.partial(fusedrnn.RNN, nonlinearity="relu"),
}
each_module = pytest.mark.parametrize("name", MODULES)
layers = pytest.mark.parametrize("num_layers", [1, 3])


def states(hx):
    return hx if isinstance(hx, tuple) else (hx,)


def assert_states(found, expected, **tolerance):
    for one, other in zip(states(found), states(expected), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def walk(module, x, state=None):
    outputs = []
    for x_t in x:
        output, state = module.step(x_t, state)
        outputs.append(output)
    return torch.stack(outputs), state


@layers
@pytest.mark.parametrize("backend", [None, "aten", "reference"])
@pytest.mark.parametrize("bias", [True, False])
@each_module
def test_steps_equal_the_sequence(name, bias, backend, num_layers):
    module = MODULES[name](
        I, H, num_layers, bias=bias, backend=backend, batch_first=True, dtype=torch.float64
    )
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    output, state = walk(module, x)
    expected, final = module(x.transpose(0, 1))
    torch.testing.assert_close(output, expected.transpose(0, 1), **VALUES64)
    assert_states(state, final, **VALUES64)

    cotangent = torch.randn_like(output)
    wanted = [x, *module.parameters()]
    found = torch.autograd.grad(output, wanted, cotangent)
    exact = torch.autograd.grad(expected.transpose(0, 1), wanted, cotangent)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, **GRADIENTS64)


@layers
@each_module
def test_steps_from_a_state_and_unbatched(name, num_layers):
    module = MODULES[name](I, H, num_layers, dtype=torch.float64).eval()
    x = torch.randn(T, B, I, dtype=torch.float64)
    _, start = module(torch.randn_like(x))
    output, state = walk(module, x, start)
    expected, final = module(x, start)
    torch.testing.assert_close(output, expected, **VALUES64)
    assert_states(state, final, **VALUES64)
    for backend in (None, "reference"):
        module.backend = backend
        alone, last = walk(module, x[:, 1], None)
        expected, final = module(x[:, 1])
        torch.testing.assert_close(alone, expected, **VALUES64)
        assert_states(last, final, **VALUES64)


def test_step_does_not_change_the_state_it_is_given():
    module = fusedrnn.LSTM(I, H, 2)
    state = (torch.randn(2, B, H), torch.randn(2, B, H))
    kept = tuple(s.clone() for s in state)
    module.step(torch.randn(B, I), state)
    assert all(map(torch.equal, state, kept))


def test_step_keeps_zoneouts_expectation_and_refuses_masks_in_training():
    module = fusedrnn.LSTM(I, H, 2, zoneout=(0.2, 0.4), recurrent_dropout=0.3).double()
    x = torch.randn(T, B, I, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"step: expected a module in evaluation .*zoneout"):
        module.step(x[0])
    module.eval()
    output, _ = walk(module, x)
    torch.testing.assert_close(output, module(x)[0], **VALUES64)


def test_step_compiles_in_one_graph():
    module = fusedrnn.LSTM(I, H, 2)
    step = torch.compile(module.step, fullgraph=True, backend="aot_eager")
    x, state = torch.randn(B, I), None
    _, state = module.step(x)
    found, next_state = step(x, state)
    expected, final = module.step(x, state)
    torch.testing.assert_close(found, expected)
    assert_states(next_state, final)


@layers
@each_module
def test_a_stream_equals_one_long_pass(name, num_layers):
    module = MODULES[name](I, H, num_layers, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    first = torch.rand(T, B) < 0.25
    first[4] = torch.tensor([True, False, False])  # an episode that begins with a chunk
    stream = module.stream()
    cuts = [(0, 4), (4, 5), (5, 12)]
    parts = [stream(x[a:b], reset=first[a:b]) for a, b in cuts]
    expected, final = module(x, reset=first)
    torch.testing.assert_close(torch.cat(parts), expected, **VALUES64)
    assert_states(stream.state, final, **VALUES64)
    assert all(not s.requires_grad for s in states(stream.state))


def test_a_stream_mixes_steps_and_chunks():
    module = fusedrnn.GRU(I, H, 2, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    stream = module.stream()
    parts = [stream(x[:5]), stream.step(x[5])[None], stream.step(x[6])[None], stream(x[7:])]
    torch.testing.assert_close(torch.cat(parts), module(x)[0], **VALUES64)


def test_reset_of_rows_between_chunks():
    module = fusedrnn.LSTM(I, H, 2, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    done = torch.tensor([True, False, True])
    mask = torch.zeros(T, B, dtype=torch.bool)
    mask[7] = done
    fresh = tuple(torch.randn(2, 1, H, dtype=torch.float64) for _ in range(2))
    for state, given in ((None, mask), (fresh, (mask, fresh))):
        stream = module.stream()
        before = stream(x[:7])
        stream.reset(done, state)
        output = torch.cat([before, stream(x[7:])])
        torch.testing.assert_close(output, module(x, reset=given)[0], **VALUES64)
    stream.reset()
    torch.testing.assert_close(stream(x), module(x)[0])


def test_reset_of_an_unbatched_stream():
    module = fusedrnn.LSTM(I, I, 2)  # as many features as layers would fit
    x = torch.randn(6, I)
    fresh = tuple(torch.randn(2, I) for _ in range(2))
    for rows, state, expected in (
        (None, None, None),
        (None, fresh, fresh),
        (torch.tensor(True), fresh, fresh),
        (torch.tensor(True), None, None),
    ):
        stream = module.stream()
        stream(x[:3])
        stream.reset(rows, state)
        assert torch.equal(stream(x[3:]), module(x[3:], expected)[0])
    stream.reset(torch.tensor(False))
    before = stream.state
    assert torch.equal(stream(x), module(x, before)[0])
    with pytest.raises(RuntimeError, match=r"rows: expected shape \(\), got \(2,\)"):
        stream.reset(torch.tensor([True, False]))


@pytest.mark.parametrize("cls", [fusedrnn.LSTM, fusedrnn.GRU, fusedrnn.RNN])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_learned_state_between_chunks_under_autocast(cls, backend):
    """Outside autocast, between its chunks: the stream's state is bfloat16 or float32 by then."""
    stream = cls(I, H, backend=backend).stream()
    fresh = tuple(torch.randn(1, 1, H) for _ in range(2 if cls is fusedrnn.LSTM else 1))
    x = torch.randn(T, B, I)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stream(x)
    dtypes = [s.dtype for s in states(stream.state)]
    stream.reset(state=fresh if len(fresh) > 1 else fresh[0])
    for state, own, dtype in zip(states(stream.state), fresh, dtypes, strict=True):
        assert torch.equal(state, own.to(dtype).expand(1, B, H))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stream(x)


def test_a_stream_that_began_anew_takes_another_batch():
    stream = fusedrnn.GRU(I, H).stream()
    stream(torch.randn(T, B, I))
    stream.reset()
    assert stream(torch.randn(T, B + 1, I)).shape == (T, B + 1, H)


def hooked(name, module):
    """`module` with a weight that a forward pre-hook computes."""
    if name == "prune":
        return prune.l1_unstructured(module, "weight_hh_l0", 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and used
        return getattr(torch.nn.utils, name)(module, "weight_hh_l0")


@pytest.mark.parametrize("hook", ["prune", "weight_norm", "spectral_norm"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_steps_after_hooks_that_compute_weights(hook, batch_first):
    module = hooked(hook, fusedrnn.GRU(I, H, batch_first=batch_first)).eval()
    with torch.no_grad():
        for parameter in module.parameters():  # an optimizer's step: the weight itself is stale
            parameter.mul_(2)
    x = torch.randn(B, I)
    state = torch.randn(1, B, H)
    output, next_state = module.step(x, state)
    time = 1 if batch_first else 0
    expected, final = module(x.unsqueeze(time), state)
    assert torch.equal(output, expected.squeeze(time))
    assert torch.equal(next_state, final)
    output, _ = module.step(x[0], state[:, 0])
    assert torch.equal(output, module(x[:1], state[:, 0])[0][0])
    assert torch.equal(module.step(x, (state,))[0], expected.squeeze(time))


@pytest.mark.parametrize("cls", [fusedrnn.LSTM, fusedrnn.GRU, fusedrnn.RNN])
def test_steps_under_torch_func(cls):
    module, cell = cls(I, H), getattr(fusedrnn, f"{cls.__name__}Cell")(I, H)
    x = torch.randn(B, I)
    found = torch.func.vmap(lambda row: module.step(row)[0])(x)
    torch.testing.assert_close(found, module.step(x)[0])
    found = torch.func.vmap(lambda row: states(cell(row))[0])(x)
    torch.testing.assert_close(found, states(cell(x))[0])
    slopes = torch.func.vmap(torch.func.grad(lambda row: module.step(row)[0].sum()))(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(slopes, torch.autograd.grad(module.step(leaf)[0].sum(), leaf)[0])
    slopes = torch.func.vmap(torch.func.grad(lambda row: states(cell(row))[0].sum()))(x)
    expected = torch.autograd.grad(states(cell(leaf))[0].sum(), leaf)[0]
    torch.testing.assert_close(slopes, expected)

    def explained(row):
        assert fusedrnn.explain(cell, row).backend == "reference"
        return row

    torch.func.vmap(explained)(x)


def test_gradients_end_at_the_chunk():
    module = fusedrnn.LSTM(I, H, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    stream = module.stream()
    stream(x[:6])
    carried = stream.state
    output = stream(x[6:])
    found = torch.autograd.grad(output.sum(), [x, *module.parameters()])
    assert not found[0][:6].any()
    assert found[0][6:].all()
    # Truncated backpropagation, spelled out.
    alone = module(x[6:], tuple(s.detach() for s in carried))[0]
    expected = torch.autograd.grad(alone.sum(), [x, *module.parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_gradients_cross_the_chunk_on_request():
    module = fusedrnn.LSTM(I, H, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    stream = module.stream(detach=False)
    output = torch.cat([stream(x[:6]), stream(x[6:])])
    found = torch.autograd.grad(output.square().sum(), x)[0]
    expected = torch.autograd.grad(module(x)[0].square().sum(), x)[0]
    torch.testing.assert_close(found, expected, **GRADIENTS64)


@pytest.mark.parametrize("kind", [fusedrnn.LSTM, fusedrnn.GRU])
def test_between_chunks_no_graph_is_kept(kind):
    x, stream = torch.randn(T, B, I), kind(I, H).stream()
    h_0 = torch.nn.Parameter(torch.zeros(1, 1, H))
    for advance in (
        lambda: stream(x),
        lambda: stream.step(x[0]),
        lambda: stream.reset(torch.arange(B) == 1, (h_0, h_0) if kind is fusedrnn.LSTM else h_0),
    ):
        advance()
        assert not any(s.requires_grad for s in states(stream.state))
        other = copy.deepcopy(stream)
        torch.testing.assert_close(other(x), stream(x))


def test_memory_of_past_chunks_is_freed():
    """An endless stream must not hold the graph of its past."""
    module = fusedrnn.GRU(I, H)
    stream = module.stream()
    past = torch.randn(T, B, I, requires_grad=True)
    stream(past)
    output = stream(torch.randn(T, B, I))
    assert torch.autograd.grad(output.sum(), past, allow_unused=True) == (None,)


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (
            lambda: fusedrnn.GRU(I, H, bidirectional=True).step(torch.randn(B, I)),
            ValueError,
            r"GRU.step: expected a module whose layers run forward, got bidirectional=True",
        ),
        (
            lambda: fusedrnn.GRU(I, H, bidirectional=True).stream(),
            ValueError,
            r"GRU.stream: expected a module whose layers run forward",
        ),
        (
            lambda: fusedrnn.GRU(I, H).stream(True),  # meant for detach
            TypeError,
            r"state: expected the Tensors of hx or None, got bool",
        ),
        (
            lambda: fusedrnn.GRU(I, H).step(torch.randn(T, B, I)),
            ValueError,
            r"step: x: expected \[B, I\] or \[I\], got shape \(12, 3, 4\)",
        ),
        (
            lambda: fusedrnn.GRU(I, H).step(torch.randn(B, 9)),
            RuntimeError,
            r"step: x: .*input_size=4, got shape \(3, 9\)",
        ),
        (
            lambda: fusedrnn.LSTM(I, H).step(torch.randn(B, I), torch.randn(1, B, H)),
            TypeError,
            r"step: state: expected the 2 tensors \('h', 'c'\), got 1",
        ),
        (
            lambda: fusedrnn.GRU(I, H).step(torch.randn(B, I), torch.randn(B, H)),
            RuntimeError,
            r"step: state \(h\): expected shape \(1, 3, 5\) for .*, got \(3, 5\)",
        ),
        (lambda: fusedrnn.Stream(torch.nn.GRU(I, H)), TypeError, r"module: .* got GRU"),
    ],
)
def test_misuse(use, error, message):
    with pytest.raises(error, match=message):
        use()


def test_misuse_of_reset():
    stream = fusedrnn.GRU(I, H).stream()
    stream.reset()  # nothing to do yet
    with pytest.raises(TypeError, match=r"rows: expected a bool tensor \[B\], got str"):
        stream.reset("all")
    with pytest.raises(RuntimeError, match=r"state: expected a stream that has begun"):
        stream.reset(state=torch.zeros(1, B, H))
    stream(torch.randn(T, B, I))
    with pytest.raises(RuntimeError, match=r"reset \(h\): expected shape \(1, 3, 5\) .* got \(\)"):
        stream.reset(state=torch.tensor(3.0))
    with pytest.raises(RuntimeError, match=r"got \(4, 1, 5\)"):
        stream.reset(state=torch.zeros(4, 1, H))
    with pytest.raises(RuntimeError, match=r"reset \(h\): expected torch.float32 on cpu"):
        stream.reset(state=torch.zeros(1, 1, H, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"rows: expected a bool tensor \[B\], got torch.int64"):
        stream.reset(torch.tensor([0, 1, 0]))
    with pytest.raises(RuntimeError, match=r"rows: expected shape \(3,\), got \(2,\)"):
        stream.reset(torch.tensor([False, True]))


STEPS = {
    "plain": {},
    "zoneout": {"zoneout": 0.1},
    "clipping": {"clip_gradient": 1.0},
    "reference": {"backend": "reference"},
    "projection": {"proj_size": 2},
}
WRONG_STEPS = {
    "integers": (lambda x, state: (x.long(), state), ValueError, "x: expected torch"),
    "another dtype": (
        lambda x, state: (x.double(), state),
        ValueError,
        "x: expected torch",
    ),
    "nothing": (lambda x, state: (None, state), TypeError, "x: expected a Tensor .*NoneType"),
    "a word": (lambda x, state: ("x", state), TypeError, "x: expected a Tensor .*str"),
    "a state's dtype": (
        lambda x, state: (x, tuple(s.double() for s in state)),
        RuntimeError,
        r"state \(h\): expected torch.float32 on cpu as the input, got torch.float64",
    ),
    "no tensors": (
        lambda x, state: (x, (1, 2)),
        TypeError,
        r"state \(h\): expected a Tensor, got int",
    ),
}


@pytest.mark.parametrize("way", STEPS)
@pytest.mark.parametrize("wrong", WRONG_STEPS)
def test_step_checks_what_the_sequence_call_checks(way, wrong):
    module = fusedrnn.LSTM(I, H, **STEPS[way]).eval()
    state = module(torch.randn(1, B, I))[1]
    change, error, message = WRONG_STEPS[wrong]
    x, state = change(torch.randn(B, I), state)
    for call in (module.step, lambda x, state: module.stream(state).step(x)):
        with pytest.raises((error, TypeError), match=message if call is module.step else None):
            call(x, state)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("way", ["reference", "vmap"])
def test_cells_check_dtypes_as_torchs(kind, way):
    cell = getattr(fusedrnn, kind)(I, H, backend="reference" if way == "reference" else None)
    call = torch.vmap(cell) if way == "vmap" else cell
    for x in (torch.ones(B, I, dtype=torch.int64), torch.randn(B, I, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"input: expected torch.float32, got"):
            call(x)
    if way == "vmap":
        return  # which itself asks for tensors
    with pytest.raises(TypeError, match="input: expected a Tensor"):
        cell("x")
    if kind == "LSTMCell":
        with pytest.raises(TypeError, match=r"hx: expected the 2 tensors \('h', 'c'\), got 1"):
            cell(torch.randn(B, I), torch.randn(B, H))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", [fusedrnn.LSTM, fusedrnn.GRU, fusedrnn.RNN])
def test_step_under_autocast_is_the_sequence_call(cls, low):
    module = cls(I, H, 2)
    x = torch.randn(2, B, I)
    with torch.autocast("cpu", dtype=low):
        expected, _ = module(x)
        one, state = module.step(x[0])
        two, state = module.step(x[1], state)
    assert torch.stack([one, two]).dtype == expected.dtype
    # Between the steps, as between chunks, the states are rounded to `low`.
    eps = torch.finfo(low).eps
    torch.testing.assert_close(torch.stack([one, two]), expected, rtol=4 * eps, atol=4 * eps)


class CellCalls(torch.overrides.TorchFunctionMode):
    """Counts the calls of torch's operators for a single step."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "").endswith("_cell")
        return function(*args, **kwargs or {})


def by_cells(call):
    with CellCalls() as calls:
        call()
    return calls.count > 0


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


# What may happen to a module between its steps, and whether torch's operator still runs them.
CHANGES = {
    "nothing": (lambda m: None, True),
    "a new parameter": (
        lambda m: setattr(m, "weight_hh_l0", torch.nn.Parameter(torch.randn(3 * H, H))),
        True,
    ),
    "new data": (lambda m: setattr(m.bias_hh_l0, "data", torch.randn(3 * H)), True),
    "assigned": (
        lambda m: m.load_state_dict(fusedrnn.GRU(I, H).state_dict(), assign=True),
        True,
    ),
    "parametrized": (
        lambda m: torch.nn.utils.parametrize.register_parametrization(m, "weight_hh_l0", Doubled()),
        True,
    ),
    "pruned": (lambda m: prune.l1_unstructured(m, "weight_hh_l0", 0.5), False),
    "a regulariser": (
        lambda m: setattr(m, "regularizers", fusedrnn.Regularizers(zoneout=0.5)),
        False,
    ),
    "another backend": (lambda m: setattr(m, "backend", "reference"), False),
    "the input added": (lambda m: setattr(m, "residual", True), True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_step_sees_what_became_of_the_module(change):
    module = fusedrnn.GRU(I, H if change != "the input added" else I).eval()
    x, state = torch.randn(B, I), module.step(torch.randn(B, I))[1]
    assert by_cells(lambda: module.step(x, state))
    alter, cells = CHANGES[change]
    alter(module)
    assert by_cells(lambda: module.step(x, state)) == cells
    output, final = module.step(x, state)
    expected, expected_final = module(x[None], state)
    torch.testing.assert_close(output, expected[0])
    torch.testing.assert_close(final, expected_final)


@pytest.mark.parametrize("cls", [fusedrnn.LSTM, fusedrnn.GRU, fusedrnn.RNN])
def test_a_plain_step_is_looked_at_once(cls, monkeypatch):
    module, x = cls(I, H), torch.randn(B, I)
    _, state = module.step(x)
    monkeypatch.setattr(streaming.arguments, "check_step", None)
    for one in (module, pickle.loads(pickle.dumps(module))):
        output, final = one.step(x, state)
        expected, expected_final = one(x[None], state)
        torch.testing.assert_close(output, expected[0])
        assert_states(final, expected_final)


def test_a_step_sees_another_dtype_mode_block_and_direction():
    module = fusedrnn.GRU(I, H)
    x, state = torch.randn(B, I), torch.randn(1, B, H)
    before, _ = module.step(x, state)
    with fusedrnn.use_backend("reference"):
        assert not by_cells(lambda: module.step(x, state))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = module.step(x, state)[0]
        assert torch.equal(low, module(x[None], state)[0][0])
        assert not by_cells(lambda: module.step(x, state))
    many = torch.func.vmap(module.step, (0, None))
    torch.testing.assert_close(many(x[None], state)[0][0], before)
    assert not by_cells(lambda: many(x[None], state))
    module.double()
    with pytest.raises(ValueError, match=r"x: expected torch.float64, got torch.float32"):
        module.step(x, state)
    torch.testing.assert_close(module.step(x.double(), state.double())[0].float(), before)
    module.float().regularizers = fusedrnn.Regularizers(recurrent_dropout=0.5)
    with pytest.raises(RuntimeError, match="expected a module in evaluation mode"):
        module.step(x, state)
    module.regularizers, module.direction = None, "reverse"
    with pytest.raises(ValueError, match="got direction='reverse'"):
        module.step(x, state)


@pytest.mark.parametrize(("change", "error", "message"), [
    (lambda x, h, c: (x[:, 1:], (h, c)), RuntimeError, r"x: .*input_size=4, got shape \(3, 3\)"),
    (lambda x, h, c: (x, (h, c.double())), RuntimeError, r"state \(c\): expected torch.float32"),
    (lambda x, h, c: (x, (h, c.to("meta"))), RuntimeError, r"state \(c\): .*got .* on meta"),
    (lambda x, h, c: (x, (h, c, c)), TypeError, r"state: expected the 2 tensors .*, got 3"),
    (lambda x, h, c: (x, (h[0], c[0])), RuntimeError, r"state \(h\): .*got \(3, 5\)"),
])  # fmt: skip
def test_a_step_that_nearly_fits(change, error, message):
    x, h, c = torch.randn(B, I), torch.randn(1, B, H), torch.randn(1, B, H)
    with pytest.raises(error, match=message):
        fusedrnn.LSTM(I, H).step(*change(x, h, c))


@pytest.mark.parametrize(
    "options", [{"num_layers": 2}, {"num_heads": 5}, {"proj_size": 2}, {"bidirectional": True}]
)
def test_a_step_of_a_layer_that_is_not_plain(options):
    module, x = fusedrnn.LSTM(I, H, **options), torch.randn(B, I)
    state = (torch.randn(1, B, H), torch.randn(1, B, H))
    if "num_heads" in options:
        expected = module(x[None], state)[0][0]
        torch.testing.assert_close(module.step(x, state)[0], expected)
        return
    with pytest.raises((RuntimeError, ValueError), match=r"LSTM.step: "):
        module.step(x, state)


# A sequence of one step


@pytest.mark.parametrize("options", [
    {},
    {"bias": False},
    {"num_layers": 3, "dropout": 0.4},
    {"num_layers": 2, "dropout": 0.4, "bidirectional": True, "batch_first": True},
])  # fmt: skip
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch", [B, None, 64])
def test_a_sequence_of_one_step_equals_torchs(options, training, batch):
    """From the same random numbers, with its gradients: to rounding, since sums differ in order."""
    module, torchs = fusedrnn.LSTM(I, H, **options), torch.nn.LSTM(I, H, **options)
    torchs.load_state_dict(module.state_dict())
    shape = (1, I) if batch is None else (batch, 1, I) if module.batch_first else (1, batch, I)
    x = torch.randn(shape, requires_grad=True)
    layers = module.num_layers * (1 + module.bidirectional)
    hx = tuple(torch.randn(layers, *([batch] if batch else []), H) for _ in range(2))
    results = []
    for one in (torchs.train(training), module.train(training)):
        for state in (None, hx):
            torch.manual_seed(3)
            output, final = one(x, state)
            slopes = torch.autograd.grad(
                output.square().sum() + final[1].sum(), [x, *one.parameters()]
            )
            with torch.no_grad():
                torch.manual_seed(3)
                again, _ = one(x, state)
            results.append([output, *final, *slopes, again, torch.get_rng_state()])
    for expected, found in zip(results[:2], results[2:], strict=True):
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one, **GRADIENTS32)
    assert by_cells(lambda: module(x)) == (training or batch != 64)
    with torch.no_grad():  # as with a gradient, so that a checkpoint has the same bits
        assert by_cells(lambda: module(x)) == (training or batch != 64)


def test_a_sequence_of_one_step_is_differentiable_twice():
    module = fusedrnn.LSTM(I, H, 2, bidirectional=True)
    x = torch.randn(1, B, I, requires_grad=True)

    def second(module, x):
        output = module(x)[0]
        (slope,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), [x, *module.parameters()])

    found = second(module, x)
    expected = second(copy.deepcopy(module).double(), x.detach().double().requires_grad_())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.float(), **GRADIENTS32)


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_plain_call_of_one_step_takes_the_short_way(batch_first, monkeypatch):
    """The same bits as the general way, which it does not enter; what is wrong goes there."""
    module = fusedrnn.LSTM(I, H, batch_first=batch_first)
    x = torch.randn((B, 1, I) if batch_first else (1, B, I))
    hx = torch.randn(1, B, H), torch.randn(1, B, H)
    way, quick = [], streaming.plain_call
    monkeypatch.setattr(streaming, "plain_call", lambda *given: None)
    general = module(x, hx)
    monkeypatch.setattr(streaming, "plain_call", quick)
    monkeypatch.setattr(stack, "run", lambda given: way.append(given))
    output, final = module(x, hx)
    assert not way
    for one, other in zip((output, *final), (general[0], *general[1]), strict=True):
        assert torch.equal(one, other)
    before = final[0].clone()
    output.data.zero_()
    assert torch.equal(final[0], before)
    monkeypatch.undo()
    for wrong, told in (
        ((x[..., 1:], hx), "input_size"),
        ((x, hx[:1]), r"h_0.*c_0.*got 1 of them"),
        ((x, (hx[0][:, 1:], hx[1])), r"hx \(h_0\): expected shape"),
        ((x, (hx[0], hx[1].double())), r"hx \(c_0\): expected torch.float32"),
    ):
        with pytest.raises((RuntimeError, TypeError), match=told):
            module(*wrong)


def test_who_runs_a_sequence_of_one_step():
    module, x = fusedrnn.LSTM(I, H), torch.randn(1, B, I)
    told = "torch's operators for a single step"
    assert told in str(fusedrnn.explain(module, x))
    for other, input, options in (
        (module, torch.randn(2, B, I), {}),
        (module, x, {"lengths": [1] * B}),
        (fusedrnn.GRU(I, H), x, {}),
        (fusedrnn.LSTM(I, H, proj_size=2), x, {}),
        (fusedrnn.LSTM(I, H, backend="reference"), x, {}),
        (copy.deepcopy(module).double(), x.double(), {}),
    ):
        hx = other(input, **options)[1]
        assert not by_cells(lambda o=other, i=input, k=options: o(i, **k))
        assert not by_cells(lambda o=other, i=input, k=options, hx=hx: o(i, hx, **k))
        assert told not in str(fusedrnn.explain(other, input, **options))
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(1, I)] * B)
    assert not by_cells(lambda: module(packed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and used
        traced = torch.jit.trace(module, x, check_trace=False)
    longer = torch.randn(T, B, I)
    torch.testing.assert_close(traced(longer)[0], module(longer)[0])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], module(x)[0])

"""return_states=True: the states of all layers and steps, by every backend, part of the graph.

The oracle shares nothing with it: torch.nn's modules called one time step and one layer at a time.
(The kernels are run by tests/kernels/test_layers.py, in the interpreter.)
"""

import pytest
import torch
from tolerances import GRADIENTS64, VALUES64
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn

T, B, I, H, L = 5, 4, 3, 6, 2
LENGTHS = [5, 0, 3, 1]
KINDS = ("LSTM", "GRU", "RNN")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_backend = pytest.mark.parametrize("backend", ["auto", "aten", "reference"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(kind, **options):
    return getattr(fusedrnn, kind)(I, H, L, bidirectional=True, dtype=torch.float64, **options)


def step_by_step(module, x, lengths):
    """The states [L * 2, T, B, width] by torch.nn, one layer, direction, row and step at a time."""
    names = ("h", "c") if module.mode == "LSTM" else ("h",)
    planes, input = [], x
    for layer in range(L):
        outputs = []
        for suffix in ("", "_reverse"):
            own = [getattr(module, f"{n}_l{layer}{suffix}") for n in ("weight_ih", "weight_hh")]
            own += [getattr(module, f"{n}_l{layer}{suffix}") for n in ("bias_ih", "bias_hh")]
            operator = {"LSTM": torch.lstm_cell, "GRU": torch.gru_cell}.get(
                module.mode, torch.rnn_tanh_cell
            )
            rows = []
            for b in range(B):
                state = tuple(x.new_zeros(1, H) for _ in names)
                steps = [tuple(x.new_zeros(H) for _ in names)] * T
                order = range(lengths[b])
                for t in reversed(order) if suffix else order:
                    new = operator(input[t, b : b + 1], state if len(names) > 1 else state[0], *own)
                    state = new if isinstance(new, tuple) else (new,)
                    steps[t] = tuple(s[0] for s in state)
                rows.append([torch.stack(column) for column in zip(*steps, strict=True)])
            states = [torch.stack(column, dim=1) for column in zip(*rows, strict=True)]
            planes.append(states)
            outputs.append(states[0])
        input = torch.cat(outputs, dim=-1)
    return {n: torch.stack(c) for n, c in zip(names, zip(*planes, strict=True), strict=True)}


def loss_of(states):
    generator = torch.Generator().manual_seed(3)
    return sum(
        (s * torch.randn(s.shape, generator=generator, dtype=s.dtype)).sum()
        for s in states.values()
    )


@each_kind
@each_backend
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["all", "lengths"])
def test_values_and_gradients(kind, backend, lengths):
    module = make(kind, backend=backend)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    expected = step_by_step(module, x, lengths or [T] * B)
    output, hx, states = module(x, lengths=lengths, return_states=True)
    plain, plain_hx = module(x, lengths=lengths)
    torch.testing.assert_close((output, hx), (plain, plain_hx), **VALUES64)
    assert list(states) == list(expected)
    leaves = [x, *module.parameters()]
    for name, value in states.items():
        assert value.shape == (L * 2, T, B, H)
        torch.testing.assert_close(value, expected[name], **VALUES64)
    found = torch.autograd.grad(loss_of(states), leaves)
    wanted = torch.autograd.grad(loss_of(expected), leaves)
    torch.testing.assert_close(found, wanted, **GRADIENTS64)


@each_kind
@each_backend
def test_layouts(kind, backend):
    module = make(kind, backend=backend)
    x = torch.randn(T, B, I, dtype=torch.float64)
    lengths = [5, 2, 3, 1]
    _, _, expected = module(x, lengths=lengths, return_states=True)

    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    for module.batch_first in (False, True):  # which a packed sequence has not
        _, _, found = module(packed, return_states=True)
        torch.testing.assert_close(found, expected, **VALUES64)

    module.batch_first = True
    _, _, found = module(x.transpose(0, 1), lengths=lengths, return_states=True)
    swapped = {name: s.transpose(1, 2) for name, s in expected.items()}
    torch.testing.assert_close(found, swapped, **VALUES64)

    module.batch_first = False
    _, _, found = module(x[:, 0], return_states=True)
    torch.testing.assert_close(found, {n: s[:, :, 0] for n, s in expected.items()}, **VALUES64)


def test_projection_and_second_derivative():
    module = fusedrnn.LSTM(I, H, proj_size=2, dtype=torch.float64)
    x = torch.randn(3, 2, I, dtype=torch.float64, requires_grad=True)
    output, (_, c_n), states = module(x, return_states=True)
    assert states["h"].shape == (1, 3, 2, 2)
    torch.testing.assert_close(states["h"][0], output)
    torch.testing.assert_close(states["c"][:, -1], c_n, **VALUES64)
    module = fusedrnn.LSTM(I, 2, dtype=torch.float64)

    def of(x):
        states = module(x, return_states=True)[2]
        return states["h"], states["c"]

    assert torch.autograd.gradgradcheck(of, x)


@each_kind
def test_resets_and_zoneout(kind):
    """The reference has them; a step that starts over starts from zeros."""
    module = make(kind, zoneout=0.3).eval()
    x = torch.randn(T, B, I, dtype=torch.float64)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[2] = True
    _, _, states = module(x, reset=reset, return_states=True)
    _, _, second = module(x[2:], return_states=True)
    for name, value in states.items():  # of the first layer: the second reads both directions
        torch.testing.assert_close(value[0, 2:], second[name][0], **VALUES64)


@each_kind
def test_dropout_does_not_touch_them(kind):
    module = make(kind, dropout=0.5)
    x = torch.randn(T, B, I, dtype=torch.float64)
    _, _, states = module(x, return_states=True)
    first = getattr(fusedrnn, kind)(I, H, bidirectional=True, dtype=torch.float64)
    own = {k: v for k, v in module.state_dict().items() if "_l0" in k}
    first.load_state_dict(own)
    torch.testing.assert_close(states["h"][:2], first(x, return_states=True)[2]["h"], **VALUES64)


@each_kind
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiled(kind, backend):
    module = make(kind, backend=backend)
    x = torch.randn(2, B, I, dtype=torch.float64)  # the loop is compiled step by step
    expected = module(x, return_states=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = compiled(x, return_states=True)
    torch.testing.assert_close(found, expected, **VALUES64)
    leaves = list(module.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(loss_of(found[2]), leaves),
        torch.autograd.grad(loss_of(expected[2]), leaves),
        **GRADIENTS64,
    )


@each_kind
def test_they_are_of_the_dtype_of_the_output(kind):
    x = torch.randn(T, B, I).bfloat16()
    output, _, states = getattr(fusedrnn, kind)(I, H, dtype=torch.bfloat16)(x, return_states=True)
    assert {s.dtype for s in states.values()} == {output.dtype} == {torch.bfloat16}


@each_kind
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_under_autocast_they_are_of_one_dtype(kind, backend, low):
    module = getattr(fusedrnn, kind)(I, H, 2, backend=backend)
    with torch.autocast("cpu", dtype=low):
        output, _, states = module(torch.randn(T, B, I), return_states=True)
    assert {s.dtype for s in states.values()} == {output.dtype}


@each_kind
@each_backend
def test_shapes_on_the_meta_device(kind, backend):
    module = make(kind, backend=backend, device="meta")
    x = torch.randn(T, B, I, dtype=torch.float64, device="meta")
    states = module(x, return_states=True)[2]
    assert {(s.shape, s.device.type) for s in states.values()} == {((L * 2, T, B, H), "meta")}

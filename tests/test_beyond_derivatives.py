"""Second derivatives, backward in evaluation mode, and the transforms of torch.func.

torch.nn on a GPU has none of them. Here they run through every path that a forward pass can take
on a CPU: torch's operators, the reference loop, and the custom ops whose backward is opaque.
"""

import functools

import pytest
import torch
from tolerances import GRADIENTS64, VALUES64
from torch import func, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn import op
from fusedrnn.backends import aten, reference
from fusedrnn.call import LayerMasks, Masks, Operands, Spec, operands_of

T, B, I, H = 3, 2, 2, 2

MODULES = {
    "lstm": lambda **kw: fusedrnn.LSTM(I, H, **kw),
    "lstm-projected": lambda **kw: fusedrnn.LSTM(I, 3, proj_size=H, **kw),
    "gru": lambda **kw: fusedrnn.GRU(I, H, **kw),
    "rnn_tanh": lambda **kw: fusedrnn.RNN(I, H, **kw),
    "rnn_relu": lambda **kw: fusedrnn.RNN(I, H, nonlinearity="relu", **kw),
}
LAYOUTS = {"1x1": {}, "2x2": {"num_layers": 2, "bidirectional": True}}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def flatten(result):
    output, final = result
    data = output.data if isinstance(output, nn.utils.rnn.PackedSequence) else output
    return data, *(final if isinstance(final, tuple) else (final,))


def as_function(module, call):
    """The module as a function of its input and every parameter."""
    names = [name for name, _ in module.named_parameters()]

    def function(x, *parameters):
        values = dict(zip(names, parameters, strict=True))
        return flatten(func.functional_call(module, values, call(x)))

    return function, [p.detach().clone().requires_grad_() for p in module.parameters()]


@pytest.mark.parametrize(
    ("packed", "training"), [(False, False), (True, True)], ids=["padded-eval", "packed-train"]
)
@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODULES)
def test_differentiable_twice(name, layout, backend, packed, training):
    module = MODULES[name](**LAYOUTS[layout], backend=backend, dtype=torch.float64)
    module.train(training)

    def call(x):
        return (pack_padded_sequence(x, torch.tensor([T, T - 1])) if packed else x,)

    function, parameters = as_function(module, call)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    # fast_mode: one random direction for each; a wrong block shows in it with probability one.
    assert gradcheck(function, (x, *parameters), fast_mode=True)
    assert gradgradcheck(function, (x, *parameters), fast_mode=True)


def layer_inputs(cell, D, packed, dtype=torch.float64):
    """The operands of one layer, and its masks."""
    gates = {"lstm": 4, "gru": 3, "rnn_tanh": 1}[cell]
    states = 2 if cell == "lstm" else 1
    kind = {"dtype": dtype, "requires_grad": True}
    x = torch.randn(T, B, I, **kind)
    hx = tuple(torch.randn(D, B, H, **kind) for _ in range(states))
    weights = []
    for _ in range(D):
        weights += [torch.randn(gates * H, I, **kind), torch.randn(gates * H, H, **kind)]
        weights += [torch.randn(gates * H, **kind), torch.randn(gates * H, **kind)]
    batch_sizes = None
    if packed:
        sizes = pack_padded_sequence(x.detach(), torch.tensor([T, T - 1]))
        x, batch_sizes = sizes.data.clone().requires_grad_(), sizes.batch_sizes
    return Operands(x, hx, (), tuple(weights)), Masks(batch_sizes=batch_sizes)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_custom_op_is_differentiable_twice(cell, D, backend, packed):
    operands, masks = layer_inputs(cell, D, packed)
    spec = Spec(cell, I, H, bidirectional=D == 2, backend=backend)

    def function(*tensors):
        return op.run(spec, operands_of(spec, tensors), masks)

    assert gradcheck(function, operands.flat(), fast_mode=True)
    assert gradgradcheck(function, operands.flat(), fast_mode=True)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_custom_op_with_everything_inside_is_differentiable_twice(cell):
    operands, _ = layer_inputs(cell, 2, packed=False)
    S = len(operands.state)
    reset_state = tuple(torch.randn_like(h, requires_grad=True) for h in operands.state)
    operands = operands._replace(reset_state=reset_state)
    noise = LayerMasks(
        dropout=torch.rand(T, B, I) < 0.5,
        input=torch.tensor([0.0, 2.0, 2.0])[:I].expand(1, B, I),
        h=torch.tensor([0.0, 2.0], dtype=torch.float64).expand(2, B, H),
        zoneout=torch.rand(T, B, 2, S, H) < 0.4,
    )
    reset = torch.tensor([[False, True], [True, False], [False, True]])
    masks = Masks(torch.tensor([2, T]), None, reset, (noise,))
    spec = Spec(cell, I, H, bidirectional=True, backend="reference", dropout=0.5)

    def function(*tensors):
        return op.run(spec, operands_of(spec, tensors), masks)

    assert gradcheck(function, operands.flat(), fast_mode=True)
    assert gradgradcheck(function, operands.flat(), fast_mode=True)


@pytest.mark.parametrize("lengths", [None, torch.tensor([2, 0])], ids=["padded", "lengths"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_cudnn_wrapper_is_differentiable_twice(cell, lengths):
    """It holds cuDNN's graph on a GPU; what it adds is the same on a CPU."""
    operands, masks = layer_inputs(cell, 1, packed=False)
    masks = masks._replace(lengths=lengths)
    spec = Spec(cell, I, H, backend="aten")

    def run(function, *tensors):
        return function(spec, operands_of(spec, tensors), masks)

    twice = functools.partial(
        aten.DifferentiableTwice.apply,
        functools.partial(run, aten.forward),
        functools.partial(run, reference.forward),
    )
    assert gradcheck(twice, operands.flat(), fast_mode=True)
    assert gradgradcheck(twice, operands.flat(), fast_mode=True)


@pytest.mark.parametrize("name", MODULES)
def test_gradient_penalty_in_float32(name):
    """The use of a second derivative: float32 takes other kernels than gradgradcheck's float64."""
    module = MODULES[name](num_layers=2)
    wide = MODULES[name](num_layers=2, dtype=torch.float64, backend="reference")
    wide.load_state_dict(module.state_dict())
    x = torch.randn(5, 3, I)

    def penalty(module, x):
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        loss = (slope.square().sum((0, 2)).sqrt() - 1).square().mean()
        return torch.autograd.grad(loss, list(module.parameters()))

    expected = penalty(wide, x.double())
    for found, exact in zip(penalty(module, x), expected, strict=True):
        # 5 steps, 2 layers, two passes: 1e-5 is a hundred float32 roundings of the largest entry.
        torch.testing.assert_close(
            found.double(), exact, rtol=0, atol=1e-5 * max(exact.abs().max().item(), 1.0)
        )


# torch.func


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODULES)
def test_vmap_over_the_batch(name, layout):
    module = MODULES[name](**LAYOUTS[layout], dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    lengths = torch.tensor([2, 3])
    found = func.vmap(lambda row: flatten(module(row)), in_dims=1, out_dims=1)(x)
    for one, many in zip(found, flatten(module(x)), strict=True):
        torch.testing.assert_close(one, many, **VALUES64)
    found = func.vmap(
        lambda row, length: flatten(module(row, lengths=length)), in_dims=(1, 0), out_dims=1
    )(x, lengths)
    for one, many in zip(found, flatten(module(x, lengths=lengths)), strict=True):
        torch.testing.assert_close(one, many, **VALUES64)


@pytest.mark.parametrize("name", MODULES)
def test_per_sample_gradients(name):
    module = MODULES[name](num_layers=2, bidirectional=True, dtype=torch.float64)
    parameters = {n: p.detach() for n, p in module.named_parameters()}
    x = torch.randn(T, 4, I, dtype=torch.float64)

    def loss(parameters, row):
        return func.functional_call(module, parameters, (row,))[0].square().sum()

    found = func.vmap(func.grad(loss), in_dims=(None, 1))(parameters, x)
    for b in range(4):
        module.zero_grad()
        module(x[:, b])[0].square().sum().backward()
        for n, p in module.named_parameters():
            torch.testing.assert_close(found[n][b], p.grad, **GRADIENTS64)


@pytest.mark.parametrize("name", MODULES)
def test_ensemble(name):
    members = [MODULES[name](num_layers=2, dtype=torch.float64) for _ in range(3)]
    parameters, buffers = func.stack_module_state(members)
    base = MODULES[name](num_layers=2, dtype=torch.float64, device="meta")
    x = torch.randn(T, B, I, dtype=torch.float64)
    found = func.vmap(lambda p, b: flatten(func.functional_call(base, (p, b), (x,))))(
        parameters, buffers
    )
    for i, member in enumerate(members):
        for one, exact in zip(found, flatten(member(x)), strict=True):
            torch.testing.assert_close(one[i], exact, **VALUES64)


@pytest.mark.parametrize("name", MODULES)
def test_forward_and_reverse_jacobians_agree(name):
    module = MODULES[name](bidirectional=True, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)

    def output(x):
        return module(x)[0]

    reverse = func.jacrev(output)(x)
    forward = func.jacfwd(output)(x)
    direct = torch.autograd.functional.jacobian(output, x)
    torch.testing.assert_close(reverse, direct, **GRADIENTS64)
    torch.testing.assert_close(forward, direct, **GRADIENTS64)
    v = torch.randn_like(x)
    value, tangent = func.jvp(output, (x,), (v,))
    torch.testing.assert_close(value, output(x), **VALUES64)
    torch.testing.assert_close(tangent, (direct * v).sum((3, 4, 5)), **GRADIENTS64)


def test_forward_mode_without_torch_func():
    module = fusedrnn.LSTM(I, H, dtype=torch.float64)
    x, v = torch.randn(2, T, B, I, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = module(torch.autograd.forward_ad.make_dual(x, v))[0]
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    _, expected = func.jvp(lambda x: module(x)[0], (x,), (v,))
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_per_sample_gradients_compile(name):
    """torch.compile outside, torch.func inside: the transform must be seen while tracing."""
    module = MODULES[name](dtype=torch.float64)
    parameters = {n: p.detach() for n, p in module.named_parameters()}
    x = torch.randn(T, 4, I, dtype=torch.float64)

    def loss(parameters, row):
        return func.functional_call(module, parameters, (row,))[0].square().sum()

    per_sample = func.vmap(func.grad(loss), in_dims=(None, 1))
    found = torch.compile(per_sample, fullgraph=True, backend="aot_eager")(parameters, x)
    for n, expected in per_sample(parameters, x).items():
        torch.testing.assert_close(found[n], expected, **VALUES64)


def test_random_regularisers_under_vmap_take_its_randomness():
    module = fusedrnn.GRU(I, 8, recurrent_dropout=0.5, zoneout=0.3, weight_drop=0.2)
    x = torch.randn(6, 1, I).expand(6, 4, I)
    different = func.vmap(lambda row: module(row)[0], in_dims=1, randomness="different")(x)
    same = func.vmap(lambda row: module(row)[0], in_dims=1, randomness="same")(x)
    assert all(not torch.equal(different[0], different[b]) for b in (1, 2, 3))
    assert all(torch.equal(same[0], same[b]) for b in (1, 2, 3))
    with pytest.raises(RuntimeError, match="randomness"):
        func.vmap(lambda row: module(row)[0], in_dims=1)(x)


def test_transforms_are_explained_and_a_forced_backend_refuses():
    module = fusedrnn.GRU(I, H)
    seen = []

    def function(row):
        seen.append(fusedrnn.explain(module, row))
        return module(row)[0]

    x = torch.randn(T, B, I)
    func.vmap(function, in_dims=1)(x)
    assert seen[0].backend == "reference"
    assert "torch.func" in seen[0].passed_over["aten"]
    module.backend = "aten"
    with pytest.raises(RuntimeError, match=r"'aten' was asked for .* torch\.func"):
        func.vmap(lambda row: module(row)[0], in_dims=1)(x)

"""Cells of a step alone: what is derived against autograd, and what is refused."""

import ast
import copy
import inspect
import itertools
import math
import pickle
import random
from types import SimpleNamespace

import pytest
import steps
import torch
import torch.nn.functional as F
from bodies import arguments, assert_backward_is_the_derivative_of_forward, backward, forward, tiles
from tolerances import GRADIENTS64, VALUES64, assert_exact

import fusedrnn
from fusedrnn import cells
from fusedrnn.cells._terms import Terms, minimum_cut, reached
from fusedrnn.cells.derived import derive

# All but those with means or other matrices, which no step can spell, and with a diagonal, whose
# bodies others have.
WRITTEN = [
    name
    for name, cell in cells.REGISTRY.items()
    if cell.weighted == cell.stages and not cell.diagonal and not cell.dense
]


def derived(step, gates, states=("h",), params=()):
    return derive(step, [gates] if isinstance(gates[0], str) else gates, states, params)[0]


def again(name):
    """A built-in cell, derived."""
    cell = cells.get(name)
    return derived(getattr(steps, name), [s.gates for s in cell.stages], cell.states, cell.params)


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0], ids=["linear", "curved", "saturated"])
def test_derives_what_was_written(name, scale):
    """Values, saved values and gradients of the built-in cells, whose bodies are by hand."""
    written, cell = cells.get(name), again(name)
    x_gates, received, state, params = arguments(written, scale)
    with torch.no_grad():
        new, kept = forward(written, x_gates, received, state, params)
        found, saved = forward(cell, x_gates, received, state, params)
        d_state = tiles(len(new), 1.0)
        expected = backward(written, d_state, kept, state, new, params)
        gradients = backward(cell, d_state, saved, state, found, params)
    for part, other in zip((new, *expected), (found, *gradients), strict=True):
        for a, b in zip(part, other, strict=True):
            assert_exact(b, a, name)
    assert len(cell.saved) == len(written.saved)
    for attribute in ("additive", "gates"):
        assert getattr(cell, attribute) == getattr(written, attribute)
    assert cell.projects == (written.projects and name != "slstm")  # whose backward reads h here


@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0])
def test_backward_of_a_cell_with_parameters_and_three_states(scale):
    cell = derived(steps.normalized, *steps.NORMALIZED.values())
    assert_backward_is_the_derivative_of_forward(cell, scale)
    assert cell.additive
    assert len(cell.saved) == 3


FORWARD = """\
def _forward(x_gates, received, values, params):
    x_u, x_n = x_gates
    h_u, h_n = received
    h_prev, = values
    u = sigmoid(x_u + h_u)
    n = tanh(x_n + h_n)
    h = u * h_prev + (1 - u) * n
    return ((h,), (u, n))
"""
BACKWARD = """\
def _backward(d_values, saved, prev, new, params):
    d_h, = d_values
    h_prev, = prev
    u, n = saved
    t = 1 - u
    d_n = d_h * t * (1 - n * n)
    d_u = d_h * (h_prev - n) * u * t
    d_gates = (d_u, d_n)
    return (d_gates, d_gates, (d_h * u,), ())
"""
LSTM_BACKWARD = """\
def _backward(d_values, saved, prev, new, params):
    d_h, d_c = d_values
    _, c_prev = prev
    _, c = new
    i, f, g, o = saved
    t = tanh(c)
    t1 = d_c + d_h * o * (1 - t * t)
    d_o = d_h * t * o * (1 - o)
    d_g = t1 * i * (1 - g * g)
    d_f = t1 * c_prev * f * (1 - f)
    d_i = t1 * g * i * (1 - i)
    d_gates = (d_i, d_f, d_g, d_o)
    return (d_gates, d_gates, (zeros_like(d_h), t1 * f), ())
"""


def test_bodies_are_as_a_person_writes_them():
    def ugrnn(x, hidden, state, params):
        u = torch.sigmoid(x.u + hidden.u)
        n = torch.tanh(x.n + hidden.n)
        return u * state.h + (1 - u) * n

    (stage,) = derived(ugrnn, ("u", "n")).stages
    (lstm,) = again("lstm").stages
    bodies = {stage.forward: FORWARD, stage.backward: BACKWARD, lstm.backward: LSTM_BACKWARD}
    for body, text in bodies.items():  # parentheses aside, which versions of Python set their way
        assert ast.unparse(ast.parse(inspect.getsource(body))) == ast.unparse(ast.parse(text))


# Where functions have corners, and where the tails of others are flat.
POINTS = [-50.0, -6.0, -3.0, -1.0, -0.7, -0.1, 0.0, 0.2, 0.5, 1.0, 2.5, 3.0, 6.0, 50.0]
OPERATORS = {
    "sub": lambda x, y: x - torch.sub(y, x, alpha=3),
    "rsub": lambda x, y: (1 - x) * torch.rsub(x, y, alpha=2),
    "div": lambda x, y: x / (2 + y * y) + 1 / (x * x + 1),
    "neg": lambda x, y: -x * -y + (-x - -y),
    "square": lambda x, y: x**2 + y.square() * x**3 + (x * x + 1) ** -1,
    "roots": lambda x, y: (x * x + 1) ** 0.5 + torch.rsqrt(y * y + 1) * torch.sqrt(x * x + 2),
    "abs": lambda x, y: x.abs() + abs(y) * x,
    "sign": lambda x, y: x * torch.sign(y) + y * x.sgn(),
    "exp": lambda x, y: torch.exp(-x * x) + torch.exp2(y / 4),
    "log": lambda x, y: torch.log(x * x + 1) + torch.log1p(y * y),
    "softplus": lambda x, y: F.softplus(x) + F.softplus(y, beta=0.5),
    "logsigmoid": lambda x, y: F.logsigmoid(x) * y,
    "maximum": lambda x, y: torch.maximum(x, y) - 3 * torch.minimum(x * x, y),
    "clamp": lambda x, y: x.clamp(-1, 3) + y.clamp(min=0) + torch.clamp_max(x * 2, 1.0),
    "where": lambda x, y: torch.where((x > y) & ~(y == 0) | (x <= -1), x, y * y),
    "numbers": lambda x, y: x * torch.where(y >= 0, 0.5, -2.0) + torch.where(x < 1, 0.0, y),
    "where not finite": lambda x, y: torch.exp(torch.where(x > 0, -math.inf, y / 50)),
    "isnan": lambda x, y: torch.where(torch.isnan(x), y, x) + x.masked_fill(y != 1, 2.0),
    "relu": lambda x, y: F.relu(x) * y + F.relu6(y) + F.leaky_relu(x, 0.2),
    "silu": lambda x, y: F.silu(x) + F.mish(y),
    "gelu": lambda x, y: F.gelu(x, approximate="tanh"),
    "elu": lambda x, y: F.elu(x) + F.selu(y) + F.elu(y, 0.5),
    "hard": lambda x, y: F.hardsigmoid(x) + F.hardtanh(y) + F.hardtanh(x, -3, 0.5),
    "hardswish": lambda x, y: F.hardswish(x - 0.05),  # torch is not of one mind at +-3
    "softsign": lambda x, y: F.softsign(x) + F.tanhshrink(y),
    "lerp": lambda x, y: torch.lerp(x, y, torch.sigmoid(x)) + torch.lerp(x, y, 0.25),
    "addcmul": lambda x, y: torch.addcmul(x, y, x, value=2) + torch.addcdiv(x, y, x * x + 1),
    "constants": lambda x, y: torch.ones_like(x) * y + torch.full_like(x, 2) * x,
    "zeros": lambda x, y: (torch.zeros_like(x) - y) * x,
    "in place": lambda x, y: (x + y).mul_(2).sub_(y).tanh_() + x.clone(),
    "no operator": lambda x, y: y,
    "a number": lambda x, y: torch.zeros_like(x),
}  # fmt: skip


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_operators_and_their_derivatives_are_torchs(operator):
    def step(x, hidden, state, params):
        return operator(x.a + hidden.a, x.b)

    cell = derived(step, ("a", "b"))
    (stage,) = cell.stages
    points = torch.tensor(POINTS, dtype=torch.float64)
    a, b = (t.clone().requires_grad_() for t in torch.cartesian_prod(points, points).T)
    zeros = torch.zeros_like(a)
    given = (a, b), (zeros, zeros), (zeros,), ()
    expected = operator(a + 0, b)
    (found,), saved = stage.forward(*given)
    torch.testing.assert_close(found.detach(), expected.detach(), **VALUES64)
    d = torch.randn(len(a), dtype=torch.float64)
    with torch.no_grad():
        dx, dh, d_values, _ = stage.backward((d,), saved, (zeros,), (found,), ())
    # Some of torch's own (of hardsigmoid, of selu) compute with constants of float32.
    for y, tolerance in ((found, GRADIENTS64), (expected, {"rtol": 2e-7, "atol": 2e-7})):
        if y.requires_grad:
            gradients = torch.autograd.grad(y, (a, b), d, materialize_grads=True)
            torch.testing.assert_close(dx, gradients, **tolerance)
    assert found.requires_grad or not (dx[0].any() or dx[1].any())
    torch.testing.assert_close(dh, (dx[0], zeros), rtol=0, atol=0)
    assert not d_values[0].any()


@pytest.mark.parametrize("name", ["clamp", "relu", "where", "hard", "maximum"])
def test_nan_comes_through(name):
    def step(x, hidden, state, params):
        return OPERATORS[name](x.a, x.b)

    nan, one = torch.tensor([math.nan, math.nan]), torch.ones(2)
    (stage,) = derived(step, ("a", "b")).stages
    for a, b in ((nan, one), (one, nan)):
        (found,), _ = stage.forward((a, b), (one, one), (one,), ())
        torch.testing.assert_close(found, OPERATORS[name](a, b), equal_nan=True)


def test_softplus_is_exact_where_torchs_rounds():
    x = torch.tensor([[21.0]], dtype=torch.float64)
    (stage,) = derived(lambda x, *_: F.softplus(x.a), ("a",)).stages
    (y,), saved = stage.forward((x,), (x,), (x,), ())
    assert_exact(y - 21, torch.log1p(torch.exp(-x)), "softplus")
    dx, *_ = stage.backward((x,), saved, (x,), (y,), ())
    assert_exact(dx[0], x * torch.sigmoid(x), "its derivative")


def test_additive_is_found_out():
    def summed(x, hidden, state, params):
        return torch.tanh(2 * x.u + (hidden.u * 2 + state.h))

    def apart(x, hidden, state, params):
        return torch.tanh(x.u * 2 + hidden.u)

    assert derived(summed, ("u",)).additive
    assert not derived(apart, ("u",)).additive


def test_projects_where_only_products_read_h():
    def leaves(x, hidden, state, params):
        c = state.c + torch.tanh(x.u + hidden.u)
        return torch.sigmoid(x.o + hidden.o) * c, c

    def forward_reads(*given):
        h, c = leaves(*given)
        return h + given[2].h, c

    def backward_reads(x, hidden, state, params):
        return torch.tanh(x.u + hidden.u), state.c

    assert derived(leaves, ("u", "o"), ("h", "c")).projects
    assert not derived(forward_reads, ("u", "o"), ("h", "c")).projects
    assert not derived(backward_reads, ("u", "o"), ("h", "c")).projects


def test_little_is_kept():
    """A state before or after is never kept, a value from which others follow is, of equals the
    last, and of a comparison what it compares."""

    def step(x, hidden, state, params):
        a = x.a + hidden.a
        c = state.c * torch.sigmoid(a) + torch.tanh(a) * F.softplus(a)
        return torch.where(c > 0, c, params.w * torch.exp(c)), c

    def compares(x, hidden, state, params):
        return torch.where(x.a > hidden.a, state.h, 0.0)

    assert derived(step, ("a",), ("h", "c"), ("w",)).saved == ("a",)
    assert len(derived(compares, ("a",)).saved) == 2


def test_the_cut_is_the_smallest_there_is():
    """Against all sets of terms, on random graphs."""
    generator = random.Random(0)
    for _ in range(60):
        terms = Terms()
        made = [terms.leaf(f"x{k}", 0) for k in range(4)]
        inputs, free = made[:3], [made[3]]
        for _ in range(8):
            made.append(terms("{} * {}", *generator.sample(made[-6:], 2)))
        free.append(generator.choice(made[4:]))
        needed = set(generator.sample(made, 4))
        found = minimum_cut(needed, inputs, free)

        def enough(kept, inputs=inputs, free=free, needed=needed):
            taken = reached(list(needed), [*kept, *free])
            return not any(t in inputs and t not in kept for t in taken)

        assert enough(found)
        sets = (c for size in range(len(found) + 1) for c in itertools.combinations(made, size))
        best = [cut for cut in sets if enough(cut)]
        assert len(found) == min(map(len, best))
        latest = max(sum(t.index for t in cut) for cut in best if len(cut) == len(found))
        assert sum(t.index for t in found) == latest


def test_four_stages_share_values_and_parameters():
    def step(x, hidden, state, params):
        a = torch.tanh(x.a + hidden.a) * params.v
        hidden = yield a * state.h
        b = torch.sigmoid(x.b * hidden.b) + torch.exp(params.w)
        hidden = yield a + b
        c = torch.where(a > x.a, torch.tanh(hidden.c + x.a), hidden.c)
        hidden = yield c * state.c
        return a * b + hidden.d * x.d, c - state.c

    gates = tuple((gate,) for gate in "abcd")
    cell = derived(step, gates, ("h", "c"), ("w", "v"))
    assert [stage.params for stage in cell.stages] == [("v",), ("w",), (), ()]
    assert_backward_is_the_derivative_of_forward(cell, 1.0)


# Modules.


def module(cell, **options):
    torch.manual_seed(0)
    made = fusedrnn.Recurrent(cell, 3, 4, **{"dtype": torch.float64, **options})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def normalized():
    return fusedrnn.cell(**steps.NORMALIZED)(steps.normalized)


def loop(rnn, input, step, gates, states, params):
    """One layer, step by step."""
    state = [torch.zeros(input.shape[1], 4, dtype=input.dtype) for _ in states]
    outputs = []
    for x_t in input:
        x = F.linear(x_t, rnn.weight_ih_l0, rnn.bias_ih_l0).chunk(len(gates), -1)
        h = F.linear(state[0], rnn.weight_hh_l0, rnn.bias_hh_l0).chunk(len(gates), -1)
        named = [zip(gates, x, strict=True), zip(gates, h, strict=True)]
        named += [zip(states, state, strict=True), ((p, getattr(rnn, f"{p}_l0")) for p in params)]
        state = step(*(SimpleNamespace(**dict(pairs)) for pairs in named))
        outputs.append(state[0])
    return torch.stack(outputs), state


@pytest.mark.parametrize("save", ["gates", "states"])
def test_a_module_is_the_loop(save):
    rnn = module(normalized(), save=save)
    input = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    leaves = (input, *rnn.parameters())
    assert {f"{p}_l0" for p in steps.NORMALIZED["params"]} < dict(rnn.named_parameters()).keys()
    found, final = rnn(input)
    expected, state = loop(rnn, input, steps.normalized, **steps.NORMALIZED)
    torch.testing.assert_close((found, *(s[0] for s in final)), (expected, *state), **VALUES64)
    d = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, d), torch.autograd.grad(expected, leaves, d),
        **GRADIENTS64,
    )  # fmt: skip


def test_second_derivatives():
    rnn = module(normalized())
    input = torch.randn(2, 1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, w: (rnn(x)[0] * w).sum(), (input, torch.randn(
        2, 1, 4, dtype=torch.float64, requires_grad=True)))  # fmt: skip


def test_a_module_learns():
    rnn = module(normalized(), dtype=torch.float32)
    x = torch.randn(8, 16, 3)
    target = torch.tanh(x.cumsum(0)[..., :1]).expand(-1, -1, 4)
    optimizer = torch.optim.Adam(rnn.parameters(), 0.03)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.mse_loss(rnn(x)[0], target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_compile_pickle_and_deepcopy():
    rnn = module(normalized(), num_layers=2)
    input = torch.randn(3, 2, 3, dtype=torch.float64)
    expected, _ = rnn(input)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    for other in (compiled, copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert torch.equal(other(input)[0], expected)
    compiled(input)[0].sum().backward()
    gradients = [p.grad for p in rnn.parameters()]
    again = torch.autograd.grad(rnn(input)[0].sum(), list(rnn.parameters()))
    torch.testing.assert_close(gradients, list(again), **GRADIENTS64)


def test_the_same_cell_again_is_the_same_and_another_is_refused():
    """A notebook's cell runs again; modules that were made of the first know it by its name."""
    first = normalized()
    assert normalized() is first is cells.get("normalized")

    def changed(*given):
        h, c, n = steps.normalized(*given)
        return 2 * h, c, n

    changed.__name__ = "normalized"
    with pytest.raises(
        ValueError, match="'normalized' is registered already, with other equations"
    ):
        fusedrnn.cell(**steps.NORMALIZED)(changed)
    with pytest.raises(ValueError, match="'lstm' is registered already"):
        fusedrnn.cell(gates=("i", "f", "g", "o"), states=("h", "c"))(steps.lstm)
    assert cells.get("normalized") is first


# What is refused.

OUTSIDE = torch.ones(3)


def branches(a):
    if a > 0:
        return a
    return -a


REFUSED = {
    "an operator": (lambda a: torch.erf(a), r"torch.erf\(a\).*aten.erf.default is not among"),
    "exact gelu": (lambda a: F.gelu(a), "aten.gelu.default is not among"),
    "a product": (lambda a: a @ a, "aten.mm.default is not.*each unit is computed for itself"),
    "a sum": (lambda a: a.sum(-1, keepdim=True), "aten.sum.dim_IntList"),
    "an index": (lambda a: a[..., :1], "aten.slice"),
    "another shape": (lambda a: a.reshape(-1), "aten.(_unsafe_)?view"),
    "noise": (lambda a: a * torch.rand_like(a), "aten.rand_like"),
    "a power": (lambda a: a**2.5, "aten.pow"),
    "no gradient": (lambda a: a.detach(), "aten.detach"),
    "another dtype": (lambda a: a.double(), "aten._to_copy"),
    "a rounded division": (lambda a: torch.div(a, 2, rounding_mode="floor"), "aten.div.Tensor_m"),
    "an if": (branches, r"test_derive.py:\d+: `if a > 0:`: asks for the value of a tensor"),
    "a float": (lambda a: a * math.exp(a), "asks for the value of a tensor"),
    "a tensor from outside": (lambda a: a + OUTSIDE, "none of its arguments; only numbers"),
    "a comparison as a number": (lambda a: a * (a > 0), "use torch.where"),
    "a number as a comparison": (lambda a: torch.logical_not(a), "use torch.where"),
    "a comparison as a state": (lambda a: a > 0, "expected tensors of numbers, got tensor"),
    "a number as a state": (lambda a: 1.0, "expected tensors of numbers, got 1.0"),
    "two states": (lambda a: (a, a), r"expected the new \('h',\), got 2 values"),
}  # fmt: skip


@pytest.mark.parametrize(("function", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses(function, message):
    def refused(x, hidden, state, params):
        return function(x.u + hidden.u)

    with pytest.raises(ValueError, match=f"cell 'refused': .*{message}"):
        derived(refused, ("u",))


@pytest.mark.parametrize(
    ("asks", "message"),
    [
        (lambda x, *_: x.q, r"x has \('u', 'n'\), not 'q'"),
        (lambda x, hidden, *_: hidden.h, r"hidden has \('u', 'n'\), not 'h'"),
        (lambda x, h, state, _: state.c, r"state has \('h',\), not 'c'"),
        (lambda x, h, s, params: params.w, r"params has \(\), not 'w'"),
    ],
)
def test_refuses_names_that_there_are_not(asks, message):
    with pytest.raises(AttributeError, match=message):
        derived(asks, ("u", "n"))


def test_refuses_stages_that_do_not_fit():
    def too_many(x, hidden, state, params):
        hidden = yield x.u
        return hidden.u

    def too_early(x, hidden, state, params):
        hidden = yield x.n
        return hidden.n

    def twice(x, hidden, state, params):
        hidden = yield x.u * params.w
        return hidden.n * params.w

    with pytest.raises(ValueError, match=r"expected 0 yields, .* got 1"):
        derived(too_many, ("u",))
    with pytest.raises(ValueError, match=r"expected 1 yields, .* got 0"):
        derived(steps.rnn_tanh, (("h",), ("n",)))
    with pytest.raises(ValueError, match="yield 1 reads gates of a later stage"):
        derived(too_early, (("u",), ("n",)))
    with pytest.raises(ValueError, match="expected one stage to read the parameter 'w', got 2"):
        derived(twice, (("u",), ("n",)), params=("w",))
    with pytest.raises(AttributeError, match=r"hidden has \('u',\), not 'n'"):
        derived(lambda x, hidden, state, params: hidden.n, (("u",), ("n",)))


def test_refuses_arguments():
    with pytest.raises(TypeError, match="gates: expected a tuple of names, got 'un'"):
        fusedrnn.cell(gates="un", states=("h",))
    with pytest.raises(ValueError, match="states must start with 'h', got"):
        fusedrnn.cell(gates=("h",), states=("c",))(steps.rnn_tanh)
    with pytest.raises(ValueError, match="duplicate field name: 'h'"):
        fusedrnn.cell(gates=("h", "h"), states=("h",))(steps.rnn_tanh)
    with pytest.raises(ValueError, match="lower-case identifier"):
        fusedrnn.cell(gates=("h",), states=("h",))(lambda x, h, s, p: x.h)

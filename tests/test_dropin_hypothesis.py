"""Whatever torch.nn's module is given, ours gives the same: drawn calls, drawn mistakes.

`auto` runs torch's own operators on a CPU, so its results must be torch's bit for bit; but packed
rows of an LSTM run through the faster operator for padded ones, and its single steps through that
for single steps. These and the reference compute in another order, so they are held to float64 by
the table in tolerances.py.
"""

import contextvars
import copy
import warnings
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from tolerances import GRADIENTS32, assert_as_good, assert_same
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import fusedrnn
from fusedrnn import dispatch


class Case(NamedTuple):
    kind: str
    options: dict
    dtype: torch.dtype
    T: int
    B: int
    layout: str  # batched, unbatched, packed, packed unsorted
    given_hx: bool
    training: bool
    contiguous: bool
    seed: int


sizes = st.integers(1, 5)


@st.composite
def cases(draw, dropout=(0.0,)):
    kind = draw(st.sampled_from(["LSTM", "GRU", "RNN"]))
    options = {
        "input_size": draw(sizes),
        "hidden_size": draw(sizes),
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "dropout": draw(st.sampled_from(dropout)),
    }
    if kind == "RNN":
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    if kind == "LSTM" and options["hidden_size"] > 1 and draw(st.booleans()):
        options["proj_size"] = draw(st.integers(1, options["hidden_size"] - 1))
    return Case(
        kind,
        options,
        draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
        draw(sizes),
        draw(st.integers(1, 4)),
        draw(st.sampled_from(["batched", "unbatched", "packed", "packed unsorted"])),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.integers(0, 2**16)),
    )


def quiet(kind, *args, **kwargs):
    """A module without torch's remark on dropout in a single layer (see test_modules.py)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return kind(*args, **kwargs)


def draw_call(case):
    """The leaves of a call, and the function that makes the call from leaves."""
    options, B = case.options, case.B
    width = options.get("proj_size") or options["hidden_size"]
    rows = options["num_layers"] * (2 if options["bidirectional"] else 1)
    features = options["input_size"]
    unbatched = case.layout == "unbatched"
    batch_first = options["batch_first"] and not unbatched
    shape = [case.T, features] if unbatched else [case.T, B, features]
    if batch_first:
        shape[:2] = B, case.T
    input = torch.randn(shape)
    if not case.contiguous:
        input = input.mT.contiguous().mT
    hx = []
    if case.given_hx:
        batch = () if unbatched else (B,)
        hx = [torch.randn(rows, *batch, width)]
        if case.kind == "LSTM":
            hx.append(torch.randn(rows, *batch, options["hidden_size"]))
    lengths = torch.randint(1, case.T + 1, (B,))
    lengths[0] = case.T
    if case.layout == "packed":
        lengths = lengths.sort(descending=True).values
    elif case.layout == "packed unsorted":
        lengths = lengths[torch.randperm(B)]

    def call(module, input, *hx):
        if case.layout.startswith("packed"):
            input = pack_padded_sequence(
                input, lengths, batch_first, enforce_sorted=case.layout == "packed"
            )
        state = (hx if len(hx) > 1 else hx[0]) if hx else None
        # The positional and the two-value forms are both in use.
        output, final = module(input, state) if hx else module(input)
        names, values = ["output"], [output]
        if isinstance(output, PackedSequence):
            values = [output.data]
            for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
                value = getattr(output, field)
                if value is not None:
                    names.append(field)
                    values.append(value)
        if isinstance(final, tuple):
            return [*names, "h_n", "c_n"], [*values, *final]
        return [*names, "h_n"], [*values, final]

    return [input, *hx], call


def run(case, module, leaves, call, dtype, *, seed=None):
    """{name: value} of every output and every gradient, by random cotangents on the outputs."""
    module = copy.deepcopy(module).to(dtype).train(case.training)
    leaves = [leaf.to(case.dtype).to(dtype).requires_grad_() for leaf in leaves]
    if seed is not None:
        torch.manual_seed(seed)
    names, outputs = call(module, *leaves)
    results = dict(zip(names, outputs, strict=True))
    wanted = [v for v in outputs if v.is_floating_point()]
    generator = torch.Generator().manual_seed(case.seed)
    cotangents = [
        torch.randn(v.shape, generator=generator).to(case.dtype).to(dtype) for v in wanted
    ]
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(wanted, [*leaves, *parameters.values()], cotangents)
    names = ["input", "h_0", "c_0"][: len(leaves)] + list(parameters)
    results |= {f"d {n}": g for n, g in zip(names, gradients, strict=True)}
    return results


def prepare(case, backend):
    torch.manual_seed(case.seed)
    torchs = quiet(getattr(torch.nn, case.kind), **case.options).to(case.dtype)
    ours = quiet(getattr(fusedrnn, case.kind), **case.options, backend=backend).to(case.dtype)
    ours.load_state_dict(torchs.state_dict())
    leaves, call = draw_call(case)
    return torchs, ours, leaves, call


@given(cases(dropout=(0.0, 0.4, 1.0)), st.sampled_from([None, "auto", "aten"]))
def test_auto_is_torch_bit_for_bit(case, backend):
    torchs, ours, leaves, call = prepare(case, backend)
    expected = run(case, torchs, leaves, call, case.dtype, seed=1)
    found = run(case, ours, leaves, call, case.dtype, seed=1)
    assert list(found) == list(expected)
    another = by_another_kernel(case)
    exact = run(case, torchs, leaves, call, torch.float64, seed=1) if another else {}
    for name, value in found.items():
        if another and value.is_floating_point():
            assert_as_good(value, expected[name], exact[name], name)
        else:
            assert_same(value, expected[name], name)


def by_another_kernel(case):
    """torch's LSTM over packed rows is not oneDNN's, and ours is; a single step has its own."""
    if case.kind != "LSTM" or "proj_size" in case.options:
        return False
    return case.layout.startswith("packed") or (case.T == 1 and case.dtype == torch.float32)


@given(cases())
def test_reference_is_as_good_as_torch(case):
    torchs, ours, leaves, call = prepare(case, "reference")
    exact = run(case, torchs, leaves, call, torch.float64)
    plain = run(case, torchs, leaves, call, case.dtype)
    found = run(case, ours, leaves, call, case.dtype)
    assert list(found) == list(exact)
    for name, value in found.items():
        if value.is_floating_point():
            assert_as_good(value, plain[name], exact[name], name)
        else:
            assert_same(value, exact[name], name)


# Mistakes. Each returns the arguments of the constructor and of the call; torch's answer, on
# the spot, is what is expected.

HIDDEN, FEATURES = 4, 3


def constructor(**wrong):
    return lambda draw, kind: (wrong, None, None)


def wrong_dims(draw, kind):
    dims = draw(st.sampled_from([0, 1, 4, 5]))
    return {}, torch.randn((2,) * (dims - 1) + (FEATURES,) if dims else ()), None


def wrong_features(draw, kind):
    features = draw(st.sampled_from([0, 1, 2, 4, 7]))
    shape = draw(st.sampled_from([(2, 2), (2,)]))
    return {}, torch.randn(*shape, features), None


def wrong_dtype(draw, kind):
    dtype = draw(st.sampled_from([torch.float64, torch.bfloat16, torch.float16, torch.int64]))
    return {}, torch.ones(2, 2, FEATURES).to(dtype), None


def no_time(draw, kind):
    return {}, torch.randn(0, 2, FEATURES), None


def state_of(kind, *shapes):
    tensors = tuple(torch.randn(*shape) for shape in shapes)
    return tensors if kind == "LSTM" else tensors[0]


def wrong_hx_shape(draw, kind):
    right = (1, 2, HIDDEN)
    axis = draw(st.integers(0, 2))
    wrong = tuple(n + (k == axis) for k, n in enumerate(right))
    which = draw(st.integers(0, 1)) if kind == "LSTM" else 0
    shapes = (wrong, right) if which == 0 else (right, wrong)
    return {}, torch.randn(5, 2, FEATURES), state_of(kind, *shapes)


def wrong_hx_dims(draw, kind):
    if draw(st.booleans()):  # batched input, unbatched state
        shapes = [(1, HIDDEN)] * 2
        return {}, torch.randn(5, 2, FEATURES), state_of(kind, *shapes)
    shapes = [(1, 2, HIDDEN)] * 2
    return {}, torch.randn(5, FEATURES), state_of(kind, *shapes)


def wrong_hx_dtype(draw, kind):
    hx = state_of(kind, *[(1, 2, HIDDEN)] * 2)
    hx = tuple(h.double() for h in hx) if kind == "LSTM" else hx.double()
    return {}, torch.randn(5, 2, FEATURES), hx


def wrong_packed_features(draw, kind):
    padded = torch.randn(3, 2, FEATURES + 1)
    return {}, pack_padded_sequence(padded, [3, 2]), None


def wrong_packed_dims(draw, kind):
    return {}, pack_padded_sequence(torch.randn(3, 2, FEATURES, 1), [3, 2]), None


def wrong_packed_hx(draw, kind):
    packed = pack_padded_sequence(torch.randn(3, 2, FEATURES), [3, 2])
    return {}, packed, state_of(kind, *[(1, 3, HIDDEN)] * 2)


CONSTRUCTOR = [
    constructor(hidden_size=0),
    constructor(hidden_size=-1),
    constructor(input_size=0),
    constructor(input_size=2.5),
    constructor(hidden_size="4"),
    constructor(num_layers=0),
    constructor(bias=1),
    constructor(batch_first="yes"),
    constructor(dropout=1.5),
    constructor(dropout=-0.1),
    constructor(dropout=True),
    constructor(proj_size=2),
    constructor(proj_size=HIDDEN),
    constructor(proj_size=-1),
    constructor(nonlinearity="sin"),
    constructor(nonlinearity="tanh"),
    constructor(device="nowhere"),
    constructor(dtype=torch.int64),
    constructor(hiden_size=3),
]
CALL = [
    wrong_dims,
    wrong_features,
    wrong_dtype,
    no_time,
    wrong_hx_shape,
    wrong_hx_dims,
    wrong_hx_dtype,
    wrong_packed_features,
    wrong_packed_dims,
    wrong_packed_hx,
]


def error_of(function):
    try:
        function()
    except Exception as error:
        return error
    return None


@given(st.data(), st.sampled_from(["LSTM", "GRU", "RNN"]), st.sampled_from(CONSTRUCTOR))
def test_constructor_mistakes(data, kind, mistake):
    options, _, _ = mistake(data.draw, kind)
    arguments = {"input_size": FEATURES, "hidden_size": HIDDEN, **options}
    expected = error_of(lambda: getattr(torch.nn, kind)(**arguments))
    found = error_of(lambda: getattr(fusedrnn, kind)(**arguments))
    note(f"{kind}({arguments}): torch says {expected!r}, we say {found!r}")
    assert type(found) is type(expected)
    if found is not None:
        assert next(iter(options)) in str(found) or str(found) == str(expected)


@given(
    st.data(),
    st.sampled_from(["LSTM", "GRU", "RNN"]),
    st.sampled_from(CALL),
    st.sampled_from(["auto", "reference"]),
)
def test_call_mistakes(data, kind, mistake, backend):
    _, input, hx = mistake(data.draw, kind)
    torchs = getattr(torch.nn, kind)(FEATURES, HIDDEN)
    ours = getattr(fusedrnn, kind)(FEATURES, HIDDEN, backend=backend)
    expected = error_of(lambda: torchs(input, hx))
    found = error_of(lambda: ours(input, hx))
    note(f"torch says {expected!r}, we say {found!r}")
    assert expected is not None, "not a mistake"
    assert type(found) is type(expected)
    argument = "hx" if hx is not None else "input"
    assert argument in str(found)
    assert "expected" in str(found)
    assert "got" in str(found)


CELL_MISTAKES = {
    "input dims": ((1, 2, FEATURES), (2, HIDDEN)),
    "features": ((2, FEATURES + 1), (2, HIDDEN)),
    "hx dims": ((2, FEATURES), (1, 1, 2, HIDDEN)),
    "hx size": ((2, FEATURES), (2, HIDDEN + 1)),
    "hx batch": ((2, FEATURES), (3, HIDDEN)),
}


@pytest.mark.parametrize("mistake", CELL_MISTAKES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cell_mistakes(kind, backend, mistake):
    shape, state = CELL_MISTAKES[mistake]
    input, h = torch.randn(shape), torch.randn(state)
    hx = (h, h) if kind == "LSTMCell" else h
    torchs = getattr(torch.nn, kind)(FEATURES, HIDDEN)
    ours = getattr(fusedrnn, kind)(FEATURES, HIDDEN, backend=backend)
    expected = error_of(lambda: torchs(input, hx))
    found = error_of(lambda: ours(input, hx))
    assert expected is not None
    assert type(found) is type(expected), f"torch says {expected!r}, we say {found!r}"
    assert "got" in str(found) or str(found) == str(expected)


NOISE = {
    "input_dropout": st.sampled_from([0.0, 0.3]),
    "recurrent_dropout": st.sampled_from([0.0, 0.3]),
    "weight_drop": st.sampled_from([0.0, 0.3]),
    "zoneout": st.sampled_from([0.0, 0.3]),
}


@given(
    cases(),
    st.sampled_from([None, "reference"]),
    st.sampled_from([float("-inf"), float("inf"), float("nan")]),
    st.fixed_dictionaries(NOISE),
    st.booleans(),
)
def test_padding_reaches_nothing(case, backend, value, noise, resets):
    """Whatever lies beyond the lengths of rows, 0 included: the bits are those of zeros there."""
    options = {k: v for k, v in case.options.items() if k != "proj_size"}
    torch.manual_seed(case.seed)
    module = quiet(getattr(fusedrnn, case.kind), **options, **noise, backend=backend)
    time_first = not options["batch_first"]
    lengths = torch.randint(0, case.T + 1, (case.B,))
    over = torch.arange(case.T)[:, None] >= lengths
    over = over if time_first else over.T
    x = torch.randn(*over.shape, options["input_size"])
    extra = {"reset": torch.rand(over.shape) < 0.3} if resets else {}
    needs_loop = resets or noise["zoneout"] or noise["recurrent_dropout"]
    module.backend = None if needs_loop else backend

    def run(filling):
        leaf = x.masked_fill(over[..., None], filling).requires_grad_()
        torch.manual_seed(case.seed)
        output, final = module(leaf, lengths=lengths, **extra)
        results = [output, *(final if isinstance(final, tuple) else (final,))]
        loss = sum(r.square().sum() for r in results)
        return [*results, *torch.autograd.grad(loss, [leaf, *module.parameters()])]

    for found, expected in zip(run(value), run(0.0), strict=True):
        assert torch.equal(found, expected)


@given(cases(dropout=(0.0, 0.4)), st.fixed_dictionaries(NOISE), st.booleans())
def test_a_generator_repeats_in_checkpoints(case, noise, reentrant):
    options = {k: v for k, v in case.options.items() if k != "proj_size"}
    own = torch.Generator()
    torch.manual_seed(case.seed)
    module = quiet(getattr(fusedrnn, case.kind), **options, **noise, generator=own)
    x = torch.randn(case.T, case.B, options["input_size"]).requires_grad_()
    call = lambda x: module(x)[0]  # noqa: E731

    def run(call):
        own.manual_seed(case.seed)
        output = call(x) * call(2 * x)
        output.sum().backward()
        leaves = [x, *module.parameters()]
        gradients = [leaf.grad.clone() for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return [output, *gradients, own.get_state()]

    expected = run(call)
    found = run(lambda x: checkpoint(call, x, use_reentrant=reentrant))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **GRADIENTS32)


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["reference", "aten", None]))))
def test_blocks_in_three_contexts(steps):
    """Opened and closed in any order across contexts, as threads and tasks have them: each sees
    its own innermost block, and nothing is left."""
    module, input = fusedrnn.GRU(2, 2), torch.randn(2, 1, 2)
    contexts = [contextvars.Context() for _ in range(3)]
    stacks: list[list] = [[], [], []]

    def seen():
        return fusedrnn.explain(module, input)

    for which, name in [*steps, *((c, None) for c in range(3) for _ in steps)]:
        context, stack = contexts[which], stacks[which]
        if name is not None:
            block = fusedrnn.use_backend(name)
            context.run(block.__enter__)
            stack.append((block, name))
        elif stack:
            context.run(stack.pop()[0].__exit__, None, None, None)
        for context, stack in zip(contexts, stacks, strict=True):
            told = context.run(seen)
            assert told.backend == (stack[-1][1] if stack else "aten")
            assert told.because.startswith("forced") == bool(stack)
        assert not seen().because.startswith("forced")
    assert dispatch._open_blocks == []
    assert dispatch._backend_in_force == "auto"

"""Whole modules through the interpreted kernels: every option that the modules offer."""

import itertools
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from layer_checks import Case, assert_as_good_as_torch, build, lengths_of

import fusedrnn
from fusedrnn import kernels
from fusedrnn.arguments import weight_shapes
from fusedrnn.call import LayerMasks, Masks, Spec, widths

MODULES = ("LSTM", "GRU", "RNN")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN, so that nothing unwritten goes unseen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


OPTIONS = {
    "plain": {},
    "stack": {"num_layers": 2, "bidirectional": True},
    "batch_first": {"batch_first": True, "bidirectional": True, "bias": False},
}


OPTIONS_OF = [  # all of the LSTM; of the others, which have nothing of their own there, the stack
    (module, options)
    for module, options in itertools.product(MODULES, OPTIONS)
    if module == "LSTM" or (module == "GRU" and options == "stack")
]


@pytest.mark.parametrize("rows", ["all", "packed", "lengths"])
@pytest.mark.parametrize("save", ["gates", "states"])
@pytest.mark.parametrize(("module", "options"), OPTIONS_OF)
def test_options(module, options, save, rows):
    assert_as_good_as_torch(Case(module, options=OPTIONS[options], save=save, rows=rows), "cpu")


@pytest.mark.parametrize("rows", ["all", "packed", "lengths"])
@pytest.mark.parametrize("save", ["gates", "states"])
def test_projection(save, rows):
    options = {"proj_size": 3, "num_layers": 2, "bidirectional": True}
    assert_as_good_as_torch(Case("LSTM", options=options, save=save, rows=rows), "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("module", MODULES)
def test_low_precision(module, dtype):
    case = Case(module, T=5, B=2, H=9, dtype=dtype, options={"bidirectional": True})
    assert_as_good_as_torch(case, "cpu")


def test_relu():
    case = Case("RNN", rows="lengths", options={"nonlinearity": "relu", "bidirectional": True})
    assert_as_good_as_torch(case, "cpu")


@pytest.mark.parametrize("module", MODULES)
def test_saturating(module):
    assert_as_good_as_torch(Case(module, scale=40.0), "cpu")


PLAIN = {"num_layers": 1, "bidirectional": False, "batch_first": False, "bias": False}


@settings(max_examples=12, deadline=None)
@example(module="RNN", T=1, B=1, I=3, H=1, save="gates", rows="all", **PLAIN)  # near h = 1
@given(
    module=st.sampled_from(MODULES),
    T=st.integers(1, 5),
    B=st.integers(1, 5),
    I=st.integers(1, 9),
    H=st.sampled_from([1, 2, 3, 16, 17, 33]),
    save=st.sampled_from(["gates", "states"]),
    rows=st.sampled_from(["all", "packed", "lengths"]),
    num_layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    batch_first=st.booleans(),
    bias=st.booleans(),
)
def test_drawn(module, T, B, I, H, save, rows, **options):
    assert_as_good_as_torch(Case(module, T, B, I, H, save=save, rows=rows, options=options), "cpu")


def test_empty_rows_keep_their_state():
    module = build(Case("LSTM", options={"bidirectional": True}), fusedrnn, torch.float32, "cpu")
    input, hx = torch.randn(4, 3, 5), (torch.randn(2, 3, 7), torch.randn(2, 3, 7))
    lengths = torch.tensor([0, 4, 0])
    with fusedrnn.use_backend("triton"):
        output, final = module(input, hx, lengths=lengths)
    for before, after in zip(hx, final, strict=True):
        torch.testing.assert_close(after[:, [0, 2]], before[:, [0, 2]], rtol=0, atol=0)
    assert (output[:, [0, 2]] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("module", MODULES)
def test_bad_values_stay_in_their_row(module, value):
    case = Case(module)
    input = torch.randn(4, 3, 5)
    dirty = input.clone()
    dirty[1, 1] = value
    rnn = build(case, fusedrnn, torch.float32, "cpu", backend="triton")
    clean_output, _ = rnn(input)
    output, _ = rnn(dirty)
    torch.testing.assert_close(output[:, [0, 2]], clean_output[:, [0, 2]], rtol=0, atol=0)
    theirs, _ = build(case, torch.nn, torch.float32, "cpu")(dirty)
    assert (output[1:, 1].isnan() == theirs[1:, 1].isnan()).all()


@pytest.mark.parametrize("module", MODULES)
def test_same_bits_every_time(module):
    case = Case(module, B=4, H=17, options={"bidirectional": True, "num_layers": 2})
    rnn = build(case, fusedrnn, torch.float32, "cpu", backend="triton")
    input = torch.randn(4, 4, 5)
    results = []
    for _ in range(2):
        rnn.zero_grad()
        output, _ = rnn(input, lengths=lengths_of(Case(B=4)))
        output.square().sum().backward()
        results.append([output, *(p.grad for p in rnn.parameters())])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_dropout_between_layers_is_seeded():
    rnn = fusedrnn.GRU(5, 64, num_layers=2, dropout=0.5, backend="triton")
    theirs = torch.nn.GRU(5, 64, num_layers=2, dropout=0.5)
    theirs.load_state_dict(rnn.state_dict())
    input = torch.randn(3, 4, 5)
    torch.manual_seed(1)
    first, _ = rnn(input)
    torch.manual_seed(1)
    second, _ = rnn(input)
    torch.manual_seed(1)
    expected, _ = theirs(input)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected)  # the same mask as torch's own draw
    rnn.eval()
    assert not torch.allclose(rnn(input)[0], first)


def test_nothing_is_saved_without_gradients():
    rnn = fusedrnn.LSTM(5, 7, backend="triton")
    input = torch.randn(4, 3, 5)
    operands = [input, *[torch.zeros(1, 3, 7)] * 2, *[p.detach() for p in rnn.parameters()]]
    spec = Spec("lstm", 5, 7, backend="triton")
    kept = {
        save: len(torch.ops.fusedrnn.stack(operands, [None] * 3, *spec._replace(save=save))) - 3
        for save in (None, "states", "gates")
    }
    assert kept == {None: 0, "states": 1, "gates": 2}
    with torch.no_grad():
        torch.testing.assert_close(rnn(input)[0], build_equal(rnn, input))


COUNTED = {
    **{name: getattr(fusedrnn, name) for name in MODULES},
    "GRU, reset before": partial(fusedrnn.Recurrent, "gru_reset_before"),
    "LSTM, projected to P": partial(fusedrnn.LSTM, proj_size=3),
}


@pytest.mark.parametrize("save", ["gates", "states"])
@pytest.mark.parametrize("module", COUNTED)
def test_numbers_kept_between_the_passes(module, save):
    """The table in kernels/README.md."""
    lines = (Path(__file__).parents[2] / "kernels" / "README.md").read_text().splitlines()
    (row,) = [line.strip("| ").split(" | ") for line in lines if line.startswith(f"| {module} |")]
    T, B, H, P = 6, 5, 7, 3
    of_h, of_p = re.fullmatch(r"(\d)? ?H( \+ P)?", row[1 + (save == "states")]).groups()
    expected = int(of_h or 1) * H + (P if of_p else 0)
    rnn = COUNTED[module](5, H, bidirectional=True, backend="triton", save=save)
    input = torch.randn(T, B, 5, requires_grad=True)
    others = {t.data_ptr() for t in (input, *rnn.parameters())}
    kept = {}

    def note(tensor):
        initial = tensor.shape[-2:] in ((B, H), (B, P))
        if tensor.data_ptr() not in others and not initial:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = rnn(input)
    del output
    assert sum(kept.values()) == expected * T * B * 2


def build_equal(rnn, input):
    theirs = torch.nn.LSTM(5, 7)
    theirs.load_state_dict(rnn.state_dict())
    return theirs(input)[0]


def test_double_backward_and_compile():
    rnn = fusedrnn.GRU(5, 7, backend="triton")
    input = torch.randn(3, 2, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(rnn(input)[0].sin().sum(), input, create_graph=True)
    gradient.square().sum().backward()
    theirs = torch.nn.GRU(5, 7)
    theirs.load_state_dict(rnn.state_dict())
    same = input.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(theirs(same)[0].sin().sum(), same, create_graph=True)
    gradient.square().sum().backward()
    torch.testing.assert_close(input.grad, same.grad)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (2, 4):
        torch.testing.assert_close(compiled(torch.ones(T, 2, 5))[0], rnn(torch.ones(T, 2, 5))[0])


@pytest.mark.parametrize(
    ("cell", "save", "trained_from", "sizes"),
    [
        ("lstm", "gates", 0, {"residual": True}),
        ("lstm", "states", 1, {}),
        ("lstm", "states", 0, {"proj_size": 3}),
        ("gru_reset_before", "gates", 1, {"hidden_size": 6, "num_heads": 2}),
    ],
)
def test_opcheck(cell, save, trained_from, sizes):
    """Of two layers in two directions, with dropout between them."""
    spec = Spec(cell, 5, 7, 2, dropout=0.5, bidirectional=True, backend="triton", save=save)
    spec = spec._replace(trained_from=trained_from, **sizes)
    state = [torch.randn(4, 3, width) for width in widths(spec)]
    weights = [torch.randn(shape) for shape in weight_shapes(spec)]
    operands = [torch.randn(2, 3, 5), *state, *weights]
    between = torch.rand(2, 3, 2 * widths(spec)[0]) < 0.5
    masks = Masks(layers=(LayerMasks(), LayerMasks(dropout=between))).flat()
    torch.library.opcheck(torch.ops.fusedrnn.stack, (operands, masks, *spec))
    output, *rest = torch.ops.fusedrnn.stack(operands, masks, *spec)
    final, kept = rest[: len(state)], rest[len(state) :]
    arguments = ([output, *final], operands, masks, output, kept, True, *spec)
    torch.library.opcheck(torch.ops.fusedrnn.stack_backward, arguments)


@pytest.mark.parametrize(
    ("module", "save", "value"),
    [
        *itertools.product(MODULES, ("gates", "states"), (float("nan"),)),
        ("LSTM", "gates", float("-inf")),
        ("LSTM", "states", float("-inf")),
        ("GRU, reset before", "states", float("nan")),
        ("LSTM, projected to P", "gates", float("nan")),
    ],
)
def test_padding_reaches_nothing(module, save, value):
    """As tests/test_beyond_lengths.py, for the kernels: input, upstream gradient, and the state of
    a row without steps."""
    rnn = COUNTED[module](5, 7, 2, bidirectional=True, backend="triton", save=save)
    lengths = torch.tensor([2, 5, 0])
    over = torch.arange(5)[:, None] >= lengths
    states = [torch.randn(4, 3, width) for width in widths(rnn._spec())]

    def run(filling):
        input = torch.randn(5, 3, 5, generator=torch.Generator().manual_seed(1))
        input[over] = filling
        hx = [s.clone() for s in states]
        for s in hx:
            s[:, 2] = filling
        leaves = [t.requires_grad_() for t in (input, *hx)]
        output, _ = rnn(input, tuple(hx) if len(hx) > 1 else hx[0], lengths=lengths)
        cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
        cotangent[over] = filling
        return [output, *torch.autograd.grad(output, [*leaves, *rnn.parameters()], cotangent)]

    for found, expected in zip(run(value), run(0.0), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("rows", ["all", "lengths", "packed"])
@pytest.mark.parametrize("module", MODULES)
def test_states_of_all_steps(module, rows, bidirectional):
    """What the kernels stored, with gradients: as the reference's, to rounding."""
    states_of_all_steps(module, rows, {"num_layers": 2, "bidirectional": bidirectional})


@pytest.mark.parametrize("rows", ["all", "lengths"])
def test_states_of_all_steps_beside_a_projection(rows):
    """For backward, what is projected is kept beside them."""
    states_of_all_steps("LSTM", rows, {"num_layers": 2, "proj_size": 3})


def states_of_all_steps(module, rows, options):
    case = Case(module, T=5, options=options)
    lengths = torch.tensor([2, 5, 3])

    def run(backend, dtype):
        rnn = build(case, fusedrnn, dtype, "cpu", backend=backend)
        generator = torch.Generator().manual_seed(1)
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
        leaf = draw(5, 3, 5).requires_grad_()
        input = leaf
        if rows == "packed":
            input = torch.nn.utils.rnn.pack_padded_sequence(leaf, lengths, enforce_sorted=False)
        extra = {"lengths": lengths} if rows == "lengths" else {}
        _, _, states = rnn(input, return_states=True, **extra)
        with torch.no_grad():  # nothing is stored for backward, then
            torch.testing.assert_close(rnn(input, return_states=True, **extra)[2], states)
        results = list(states.values())
        gradients = torch.autograd.grad(
            results, [leaf, *rnn.parameters()], [draw(*r.shape) for r in results]
        )
        return [t.double() for t in (*results, *gradients)]

    exact, plain = run("reference", torch.float64), run("reference", torch.float32)
    for found, near, true in zip(run("triton", torch.float32), plain, exact, strict=True):
        scale = true.abs().max()
        limit = 2 * (near - true).abs().max() + 16 * torch.finfo(torch.float32).eps * scale
        assert (found - true).abs().max() <= limit


@pytest.mark.parametrize(
    ("rows", "sizes"), [(6, [3, 0, 3]), (5, [1, 3, 1]), (5, [3, 3]), (7, [3, 3])]
)
def test_a_malformed_packed_sequence_meets_no_kernel(rows, sizes):
    rnn = fusedrnn.GRU(5, 7, backend="triton")
    packed = torch.nn.utils.rnn.PackedSequence(torch.randn(rows, 5), torch.tensor(sizes))
    with pytest.raises(RuntimeError, match=r"batch_sizes: expected .*, got"):
        rnn(packed)
    flat = [p.detach() for p in rnn.parameters()]
    spec = Spec("gru", 5, 7, backend="triton", save=None)
    operands = [packed.data, torch.zeros(1, 3, 7), *flat]
    with pytest.raises(RuntimeError, match=r"batch_sizes: expected .*, got"):
        torch.ops.fusedrnn.stack(operands, [None, packed.batch_sizes, None], *spec)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weight_hh_l1", lambda w: w[:7]),
        ("weight_hh_l1", lambda w: w.double()),
        ("weight_ih_l1", lambda w: w[:, :5]),
        ("bias_hh_l1", lambda w: w[:7]),
    ],
)
def test_no_kernel_is_given_a_parameter_that_does_not_fit(name, change, grad):
    """Modules' parameters can be replaced; a kernel would read beyond what is too small."""
    rnn = fusedrnn.LSTM(5, 7, 2, backend="triton")
    setattr(rnn, name, torch.nn.Parameter(change(getattr(rnn, name).detach())))
    with pytest.raises((RuntimeError, ValueError)), torch.set_grad_enabled(grad):
        rnn(torch.randn(4, 3, 5))


@pytest.mark.parametrize("frozen", [1, 2])
def test_frozen_layers_keep_nothing_and_run_no_backward(frozen, monkeypatch):
    """As in finetuning, where the lower layers stay as they are."""
    rnn = fusedrnn.LSTM(5, 7, 3, dropout=0.5, bidirectional=True, backend="triton")
    names = [name for name, _ in rnn.named_parameters()]
    trained = [name for name in names if int(name.split("_l")[1][0]) >= frozen]
    for name in set(names) - set(trained):
        getattr(rnn, name).requires_grad_(False)
    launches, scan_backward = [], kernels.scan_backward
    monkeypatch.setattr(
        kernels, "scan_backward", lambda *a, **k: launches.append(1) or scan_backward(*a, **k)
    )
    x, kept = torch.randn(4, 3, 5), []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    )

    def loss():
        torch.manual_seed(4)
        output, (h_n, _) = rnn(x)
        return output.square().sum() + h_n.sum()

    with hooks:
        value = loss()
    some = sum(kept)
    gradients = torch.autograd.grad(value, [getattr(rnn, name) for name in trained])
    assert len(launches) == 3 - frozen
    for parameter in rnn.parameters():
        parameter.requires_grad_()
    kept.clear()
    with hooks:
        value = loss()
    assert some < sum(kept)
    expected = torch.autograd.grad(value, [getattr(rnn, name) for name in trained])
    for one, other in zip(gradients, expected, strict=True):
        assert torch.equal(one, other)


def test_states_of_frozen_layers_are_returned():
    rnn = fusedrnn.LSTM(5, 7, 2, backend="triton")
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        getattr(rnn, name).requires_grad_(False)
    x = torch.randn(4, 3, 5)
    output, _, states = rnn(x, return_states=True)
    (states["c"][0].sum() + states["c"][1].sum() + output.sum()).backward()
    found = rnn.weight_hh_l1.grad
    rnn.backend, rnn.weight_hh_l1.grad = "reference", None
    expected, _, others = rnn(x, return_states=True)
    (others["c"][1].sum() + expected.sum()).backward()
    torch.testing.assert_close(states, others)
    torch.testing.assert_close(found, rnn.weight_hh_l1.grad)

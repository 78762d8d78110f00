"""torch.compile and torch.export: one graph, any batch and time, the numbers of eager mode."""

import contextvars

import pytest
import torch
from tolerances import FLOOR, error, floor
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn
from fusedrnn import dispatch, op
from fusedrnn.arguments import weight_shapes
from fusedrnn.backends import onednn
from fusedrnn.call import LayerMasks, Masks, Operands, Spec

MODULES = {
    "lstm": lambda: fusedrnn.LSTM(3, 4, num_layers=2, bidirectional=True),
    "lstm_projection": lambda: fusedrnn.LSTM(3, 4, proj_size=2, bias=False),
    "gru": lambda: fusedrnn.GRU(3, 4, num_layers=2, batch_first=True),
    "rnn_tanh": lambda: fusedrnn.RNN(3, 4, bidirectional=True),
    "rnn_relu": lambda: fusedrnn.RNN(3, 4, nonlinearity="relu"),
    "heads": lambda: fusedrnn.GRU(3, 4, num_heads=2),
    "reset_before": lambda: fusedrnn.Recurrent("gru_reset_before", 3, 4, bidirectional=True),
    "lstm_cell": lambda: fusedrnn.LSTMCell(3, 4),
    "gru_cell": lambda: fusedrnn.GRUCell(3, 4),
}
SEQUENCES = [name for name in MODULES if "cell" not in name]
every_module = pytest.mark.parametrize("name", MODULES)
backends = pytest.mark.parametrize("backend", ["auto", "reference"])


class Graphs:
    """A compiler backend that counts what it is given; aot_eager traces backward too."""

    def __init__(self):
        self.compiled = 0

    def __call__(self, graph, inputs):
        self.compiled += 1
        return aot_eager(graph, inputs)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def flat(outputs):
    return list(torch.utils._pytree.tree_leaves(outputs))


def gradients(module, outputs, leaves, seed=5):
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    loss = sum((o * c).sum() for o, c in zip(outputs, cotangents, strict=True))
    return torch.autograd.grad(loss, [*leaves, *module.parameters()])


def assert_equal(found, expected):
    """Same operators, layer by layer instead of in one call: equal but for the last digits."""
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        atol = 16 * FLOOR[a.dtype] * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def inputs_of(name, T, B):
    if "cell" in name:
        return torch.randn(B, 3, requires_grad=True)
    return torch.randn(T, B, 3, requires_grad=True)


def check(module, compiled, input):
    found, expected = flat(compiled(input)), flat(module(input))
    assert_equal(found, expected)
    assert_equal(
        gradients(module, found, [input]),
        gradients(module, expected, [input]),
    )


@every_module
@backends
def test_one_graph_for_every_shape(name, backend):
    """Forward and backward; a second graph for another shape would raise."""
    module = MODULES[name]()
    module.backend = backend
    graphs = Graphs()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=graphs)
    check(module, compiled, inputs_of(name, 5, 2))
    first = graphs.compiled
    assert counters["stats"]["unique_graphs"] == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        for T, B in ((6, 3), (9, 4), (2, 7)):
            check(module, compiled, inputs_of(name, T, B))
    assert graphs.compiled == first
    assert not counters["graph_break"]


def test_no_flag_is_needed():
    """Without dynamic=True the second shape makes the graph dynamic, and that is the last."""
    module = MODULES["gru"]()
    graphs = Graphs()
    compiled = torch.compile(module, backend=graphs)
    for T, B in ((5, 2), (6, 3)):
        check(module, compiled, inputs_of("gru", T, B))
    with torch.compiler.set_stance("fail_on_recompile"):
        for T, B in ((9, 4), (4, 8)):
            check(module, compiled, inputs_of("gru", T, B))
    assert not counters["graph_break"]


class Model(nn.Module):
    """Embedding, dropout, recurrent layer with a given state, head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 3)
        self.rnn = fusedrnn.LSTM(3, 4, num_layers=2, dropout=0.5)
        self.head = nn.Linear(4, 11)

    def forward(self, tokens, state):
        output, state = self.rnn(self.embed(tokens), state)
        return self.head(output), state


def test_a_model_through_inductor():
    """The default compiler, code generation included: a step of training in evaluation mode."""
    model = Model().eval()
    compiled = torch.compile(model, fullgraph=True)
    tokens = torch.randint(0, 11, (6, 2))
    state = (torch.randn(2, 2, 4, requires_grad=True), torch.randn(2, 2, 4, requires_grad=True))
    results = []
    for run in (model, compiled):
        logits, (h_n, c_n) = run(tokens, state)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        loss = loss + h_n.square().sum() + c_n.sum()
        results.append([loss, *torch.autograd.grad(loss, [*state, *model.parameters()])])
    assert_equal(results[1], results[0])
    assert not counters["graph_break"]


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_tensor_in_several_places(kind):
    """One matrix for W_ih and W_hh, one vector for both biases, (h, h) as the state: the gradient
    of each is the sum over its places."""
    module = getattr(fusedrnn, kind)(4, 4)
    module.weight_hh_l0, module.bias_hh_l0 = module.weight_ih_l0, module.bias_ih_l0
    x = torch.randn(5, 2, 4, requires_grad=True)
    h = torch.randn(1, 2, 4, requires_grad=True)

    def run(x, h):
        return module(x, (h, h) if kind == "LSTM" else h)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=aot_eager)
    found, expected = flat(compiled(x, h)), flat(run(x, h))
    assert_equal(found, expected)
    assert_equal(gradients(module, found, [x, h]), gradients(module, expected, [x, h]))


WORKSPACE = {
    "plain": {},
    "stack": {"num_layers": 2, "bidirectional": True, "dropout": 1.0},
    "batch_first": {"batch_first": True, "bias": False},
    "turned": {"direction": "reverse"},
}


# (of the tensors, of autocast)
COMPUTED_IN = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "autocast bfloat16": (torch.float32, torch.bfloat16),
    "autocast float16": (torch.float32, torch.float16),
}


def skip_without_a_kernel(computed_in):
    if torch.bfloat16 in computed_in and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 here")


def some_lengths(T, B):
    return torch.tensor([0, T, max(T - 2, 1)][:B])


def some_resets(T, B, batch_first):
    reset = torch.rand(T, B) < 0.3
    reset[0] = torch.arange(B) == 1
    return reset.T.contiguous() if batch_first else reset


CALLS = {
    "plain": lambda T, B, batch_first: {},
    "lengths": lambda T, B, batch_first: {"lengths": some_lengths(T, B)},
    "no step": lambda T, B, batch_first: {"lengths": torch.zeros(B, dtype=torch.int64)},
    "reset": lambda T, B, batch_first: {"reset": some_resets(T, B, batch_first)},
    "both": lambda T, B, batch_first: {
        "lengths": some_lengths(T, B),
        "reset": some_resets(T, B, batch_first),
    },
    "packed": lambda T, B, batch_first: {"packed": torch.tensor([T, max(T - 2, 1), 1][:B])},
}


# Other calls in another dtype differ in neither from what is here.
FORWARD_ONCE = [
    pytest.param(COMPUTED_IN[low], layers, call, id=f"{low}-{layers}-{call}")
    for low in COMPUTED_IN
    for layers in WORKSPACE
    for call in CALLS
    if low == "float32" or call == "plain" or layers == "stack"
]


@pytest.mark.parametrize(("computed_in", "layers", "call"), FORWARD_ONCE)
def test_a_compiled_lstm_computes_forward_once(computed_in, layers, call, monkeypatch):
    """Its backward reads oneDNN's workspace; what would compute forward again is broken here."""
    skip_without_a_kernel(computed_in)
    (dtype, low), options = computed_in, WORKSPACE[layers]
    module = fusedrnn.LSTM(3, 4, dtype=dtype, **options)
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)

    def run(input, hx, sizes=None, **options):
        output, state = module(
            PackedSequence(input, sizes) if sizes is not None else input, hx, **options
        )
        return [output.data if sizes is not None else output, *state]

    def results(run, input, *hx, packed=None, **options):
        given, leaves = (input, hx), [input, *hx]
        if packed is not None:  # Dynamo cannot tell that a given state has B rows
            rows = pack_padded_sequence(input, packed, module.batch_first)
            given, leaves = (rows.data, None, rows.batch_sizes), [input]
        with torch.autocast("cpu", low, enabled=low is not None):
            outputs = run(*given, **options)
        return [*outputs, *gradients(module, outputs, leaves)]

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=aot_eager)
    for T, B in ((5, 2), (6, 3), (1, 2)):
        shape = (B, T, 3) if module.batch_first else (T, B, 3)
        state = (len(module.all_weights), B, 4)
        given = [torch.randn(s, dtype=dtype, requires_grad=True) for s in (shape, state, state)]
        options = CALLS[call](T, B, module.batch_first)
        expected = results(run, *given, **options)
        with monkeypatch.context() as broken:
            broken.setattr(op, "run_plain", None)
            assert_floor(results(compiled, *given, **options), expected, low)


def assert_floor(found, expected, low=None):
    """The same kernels on the same numbers: but for where they are added, and what was rounded to
    `low` on the way, the last rounding."""
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert error(a, b) <= floor(b, low or b.dtype)


def no_kernel(*args):
    raise RuntimeError("could not create a primitive descriptor")


@pytest.mark.parametrize("computed_in", COMPUTED_IN.values(), ids=list(COMPUTED_IN))
def test_a_workspace_that_was_lost_is_computed_again(computed_in, monkeypatch):
    """A hook on saved tensors copies one byte of it. Without oneDNN, without a kernel of it for
    these tensors, and without any row, there is none from the start."""
    skip_without_a_kernel(computed_in)
    dtype, low = computed_in
    module = fusedrnn.LSTM(3, 4, dtype=dtype)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=aot_eager)
    has, there = onednn.has_workspace, []
    monkeypatch.setattr(onednn, "has_workspace", lambda k: there.append(has(k)) or there[-1])

    def results(run, input):
        with torch.autocast("cpu", low, enabled=low is not None):
            outputs = flat(run(input))
        return [*outputs, *gradients(module, outputs, [input])]

    def compare(*, kept, B=2):
        input = torch.randn(5, B, 3, dtype=dtype, requires_grad=True)
        assert_floor(results(compiled, input), results(module, input), low)
        assert there == [kept]
        there.clear()

    compare(kept=True)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        compare(kept=False)
    with torch.backends.mkldnn.flags(enabled=False):
        compare(kept=False)
    with monkeypatch.context() as other:
        other.setattr(torch.ops.aten, "mkldnn_rnn_layer", no_kernel)
        compare(kept=False)
    compare(kept=False, B=0)


def test_of_steps_that_failed_nothing_is_kept(monkeypatch):
    """A reset that meets an infinity is left to the loop, in forward and in backward."""
    module = fusedrnn.LSTM(3, 4)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=aot_eager)
    has, there = onednn.has_workspace, []
    monkeypatch.setattr(onednn, "has_workspace", lambda k: there.append(has(k)) or there[-1])
    input, reset = torch.randn(5, 2, 3), (torch.arange(5) == 3)[:, None].expand(5, 2)
    for c, kept in ((0.0, True), (torch.inf, False)):
        hx = (torch.zeros(1, 2, 4), torch.full((1, 2, 4), c))
        found, expected = (flat(run(input, hx, reset=reset)) for run in (compiled, module))
        assert found[0][3:].isfinite().all()
        for run in (found, expected):
            run += gradients(module, [run[0][3:], *run[1:]], [])
        for a, b in zip(found, expected, strict=True):
            near = floor(b.nan_to_num(0, 0, 0), b.dtype)
            torch.testing.assert_close(a, b, rtol=0, atol=near, equal_nan=True)
        assert there.pop() is kept


def test_a_gradient_of_a_row_without_a_step_goes_to_its_state_alone():
    """Even one that is NaN: it would be no 0 after a closed gate."""
    module = fusedrnn.LSTM(3, 4)
    compiled = torch.compile(module, fullgraph=True, backend=aot_eager)
    input, lengths = torch.randn(5, 2, 3, requires_grad=True), torch.tensor([0, 4])
    hx = [torch.randn(1, 2, 4, requires_grad=True) for _ in range(2)]
    _, final = compiled(input, tuple(hx), lengths=lengths)
    d_final = [torch.ones(1, 2, 4).index_fill_(1, torch.tensor(0), torch.nan) for _ in range(2)]
    found = torch.autograd.grad(final, [*hx, input, *module.parameters()], d_final)
    for d_state in found[:2]:
        assert d_state[:, 0].isnan().all()
        assert d_state[:, 1].isfinite().all()
    assert all(d.isfinite().all() for d in found[2:])


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_dropout_between_layers(dropout):
    """At 1.0 nothing of layer 0 reaches layer 1: compiled and eager agree without a seed."""
    module = fusedrnn.GRU(3, 4, num_layers=2, dropout=dropout)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    input = torch.randn(5, 2, 3)
    assert_equal(flat(compiled(input)), flat(module(input)))
    half = fusedrnn.GRU(3, 4, num_layers=2, dropout=0.5)
    compiled = torch.compile(half, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(input)[0], compiled(input)[0])
    half.eval()
    assert_equal(flat(compiled(input)), flat(half(input)))


def test_lengths():
    module = fusedrnn.LSTM(3, 4, bidirectional=True)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([5, 2, 1], [1, 6, 0, 4], [0, 0]):
        input = torch.randn(6, len(lengths), 3)
        lengths = torch.tensor(lengths)
        found, expected = (flat(run(input, lengths=lengths)) for run in (compiled, module))
        assert_equal(found, expected)
        assert_equal(gradients(module, found, []), gradients(module, expected, []))


def test_a_forced_backend_is_part_of_the_graph():
    """A context entered after compilation counts: the graph is guarded on it."""
    module = fusedrnn.LSTM(3, 4)
    graphs = Graphs()
    compiled = torch.compile(module, fullgraph=True, backend=graphs)
    input = torch.randn(5, 2, 3)
    expected = flat(module(input))
    assert_equal(flat(compiled(input)), expected)
    before = graphs.compiled
    with fusedrnn.use_backend("reference"):
        assert_equal(flat(compiled(input)), expected)
    assert graphs.compiled > before


def test_blocks_leave_nothing_in_compiled_code(monkeypatch):
    """It runs what the newest open block of the process says, whatever order blocks end in."""
    module, input = fusedrnn.LSTM(3, 4), torch.randn(5, 2, 3)
    ran = []
    original = op.run_plain
    monkeypatch.setattr(op, "run_plain", lambda s, *a: ran.append(s.backend) or original(s, *a))
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")

    def backend():
        ran.clear()
        with torch.no_grad():
            compiled(input)
        return ran[0]

    assert backend() == "aten"
    with fusedrnn.use_backend("reference"):
        assert backend() == "reference"
        with fusedrnn.use_backend("aten"):
            assert backend() == "aten"
        assert backend() == "reference"
    assert backend() == "aten"
    first, second = fusedrnn.use_backend("reference"), fusedrnn.use_backend("auto")
    contexts = contextvars.copy_context(), contextvars.copy_context()  # as two tasks have
    contexts[0].run(first.__enter__)
    contexts[1].run(second.__enter__)
    contexts[0].run(first.__exit__, None, None, None)
    assert backend() == "aten"
    contexts[1].run(second.__exit__, None, None, None)
    assert backend() == "aten"
    assert dispatch._open_blocks == []


def test_a_block_inside_a_compiled_function():
    module, input = fusedrnn.GRU(3, 4), torch.randn(5, 2, 3)

    def call(input):
        with fusedrnn.use_backend("reference"):
            return module(input)[0]

    graphs = Graphs()
    torch._dynamo.reset()
    assert_equal([torch.compile(call, fullgraph=True, backend=graphs)(input)], [module(input)[0]])
    assert dispatch._backend_in_force == "auto"


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("strict", [False, True], ids=["default", "strict"])
def test_export(name, strict):
    module = MODULES[name]()
    batch_first = module.batch_first
    time, batch = Dim("time", min=2, max=64), Dim("batch", min=2, max=64)
    shapes = {0: batch, 1: time} if batch_first else {0: time, 1: batch}
    program = torch.export.export(
        module, (torch.randn(5, 3, 3),), dynamic_shapes={"input": shapes}, strict=strict
    )
    graphs = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = [node.target for graph in graphs for node in graph.graph.nodes]
    assert targets.count(torch.ops.fusedrnn.stack.default) == 1
    for other in (program.module(), program.run_decompositions().module()):
        for T, B in ((5, 3), (9, 2), (2, 7)):
            input = torch.randn(T, B, 3)
            assert_equal(flat(other(input)), flat(module(input)))


@pytest.mark.parametrize("name", ["lstm_cell", "gru_cell"])
def test_export_of_a_cell(name):
    module = MODULES[name]()
    program = torch.export.export(
        module, (torch.randn(3, 3),), dynamic_shapes={"input": {0: Dim("batch", min=2, max=64)}}
    )
    input = torch.randn(6, 3)
    assert_equal(flat(program.module()(input)), flat(module(input)))


def test_export_saves_and_loads(tmp_path):
    module = fusedrnn.GRU(3, 4, bidirectional=True)
    input = torch.randn(5, 2, 3)
    torch.export.save(torch.export.export(module, (input,)), tmp_path / "gru.pt2")
    loaded = torch.export.load(tmp_path / "gru.pt2")
    assert_equal(flat(loaded.module()(input)), flat(module(input)))


# The operators themselves


def operator_samples():
    """Arguments of fusedrnn::stack: every cell and layout, mostly in two directions."""
    T, B, I, H = 4, 3, 2, 5
    for cell in ("lstm", "gru", "rnn_tanh"):
        cases = ("plain", "batch_first", "lengths", "packed", "no_bias", "reset", "stack", "turned")
        kept = ("workspace", "workspace batch_first", "workspace lengths", "workspace packed")
        kept += ("workspace reset", "autocast workspace", "autocast workspace lengths")
        kept = kept if cell == "lstm" else ()
        low = ("autocast", "autocast packed", "autocast lengths")
        for case in (*cases, *low, *kept):
            for D in (1, 2) if case == "plain" else (1,) if case == "turned" else (2,):
                P = 2 if (cell, case) == ("lstm", "no_bias") else 0
                L = 2 if case in ("stack", "turned") else 1
                batch_first = case.endswith("batch_first")
                spec = Spec(
                    cell, I, H, L, case != "no_bias", batch_first, bidirectional=D == 2,
                    proj_size=P, save="workspace" if case in kept else None, dropout=0.5,
                    backend="reference" if case == "reset" and cell != "lstm" else "aten",
                    autocast="bfloat16" if case.startswith("autocast") else None,
                    reversed_layers=2 * (case == "turned"), residual=case == "turned",
                )  # fmt: skip
                weights = [torch.randn(shape) / 2 for shape in weight_shapes(spec)]
                state = [torch.randn(L * D, B, P or H)]
                state += [torch.randn(L * D, B, H)] if cell == "lstm" else []
                input = torch.randn(*((B, T) if batch_first else (T, B)), I)
                masks = Masks()
                if case.endswith("lengths"):
                    masks = Masks(lengths=torch.tensor([2, 4, 1]))
                if case.endswith("packed"):
                    masks = Masks(batch_sizes=torch.tensor([3, 2, 2, 1]))
                    input = torch.randn(8, I)
                if case.endswith("reset"):
                    masks = Masks(reset=torch.rand(T, B) < 0.3)
                if case == "stack":
                    dropout = torch.rand(T, B, D * H) < 0.5
                    masks = Masks(layers=(LayerMasks(), LayerMasks(dropout=dropout)))
                operands = Operands(input, tuple(state), (), tuple(weights))
                yield pytest.param(
                    (list(operands.flat()), masks.flat(), *spec), id=f"{cell}-{case}-{D}"
                )


every_sample = pytest.mark.parametrize("arguments", list(operator_samples()))


@every_sample
def test_opcheck_of_the_stack(arguments):
    torch.library.opcheck(torch.ops.fusedrnn.stack.default, arguments)


@every_sample
def test_opcheck_of_its_backward(arguments):
    operands, masks, *spec = arguments
    S = 2 if spec[0] == "lstm" else 1
    outputs = torch.ops.fusedrnn.stack(*arguments)
    d_outputs = [torch.randn_like(o) for o in outputs[: 1 + S]]
    given = (d_outputs, operands, masks, outputs[0], outputs[1 + S :], True, *spec)
    torch.library.opcheck(torch.ops.fusedrnn.stack_backward.default, given)


class Seen(torch.Tensor):
    """A subclass that notes which operators it meets."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        seen.append(str(function))
        plain = torch.utils._pytree.tree_map_only(Seen, lambda t: t.inner, (args, kwargs or {}))
        return function(*plain[0], **plain[1])


seen = []


def test_a_subclass_of_tensor_meets_the_operator_and_not_its_body():
    """Among the weights too: a kernel would read memory that a wrapper does not have."""
    seen.clear()
    spec = Spec("gru", 3, 4, backend="triton", save=None)
    weights = [torch.randn(shape) for shape in weight_shapes(spec)]
    operands = Operands(torch.randn(5, 2, 3), (torch.zeros(1, 2, 4),), (), tuple(weights))
    expected = op.run(spec, operands, Masks())
    wrapped = operands._replace(weights=(*weights[:1], Seen(weights[1]), *weights[2:]))
    found = op.run(spec, wrapped, Masks())
    assert "fusedrnn.stack.default" in seen
    assert_equal(list(found), list(expected))

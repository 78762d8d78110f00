"""The CPU's time loop against the reference: every cell, with all that a loop can do."""

import random

import pytest
import torch
from tolerances import GRADIENTS32, GRADIENTS64, VALUES64, assert_as_good, assert_same

import fusedrnn
from fusedrnn import cells, dispatch
from fusedrnn.backends import loop, reference
from fusedrnn.call import LayerMasks, Masks, Operands, Spec, directions, operands_of, widths

NAMES = sorted(cells.REGISTRY)


def drawn(name, seed, dtype=torch.float64):
    """A call of one layer, drawn: its spec, its operands, its masks."""
    rng = random.Random(f"{name}{seed}")
    torch.manual_seed(seed)
    cell = cells.get(name)
    T, B, I, H = rng.randint(1, 6), rng.randint(1, 5), 3, rng.choice([4, 8])
    bidirectional = rng.random() < 0.4
    P = rng.choice([0, 0, 2]) if cell.projects else 0
    spec = Spec(
        name, I, H, bias=rng.random() < 0.8, bidirectional=bidirectional, proj_size=P,
        num_heads=1 if P or cell.dense else rng.choice([1, 1, 2]), training=True, backend="loop",
        batch_first=rng.random() < 0.4, save=rng.choice(["gates", "states"]),
        clip=rng.choice([0.0, 0.0, 0.3]),
        reversed_layers=int(not bidirectional and rng.random() < 0.3),
    )  # fmt: skip
    lengths = sizes = reset = zoneout = h_mask = None
    kind = rng.choice(["plain", "lengths", "packed"])
    if kind == "packed":
        spec = spec._replace(batch_first=False)
        steps = sorted([rng.randint(1, T) for _ in range(B)], reverse=True)
        sizes = (torch.tensor(steps)[:, None] > torch.arange(steps[0])).sum(0)
        rows = (sum(steps),)
    else:
        rows = (B, T) if spec.batch_first else (T, B)
        lengths = torch.tensor([rng.randint(0, T) for _ in range(B)]) if kind == "lengths" else None
        reset = torch.rand(rows) < 0.3 if rng.random() < 0.5 else None
    D, S = directions(spec), len(cell.states)
    state = tuple(torch.randn(D, B, width, dtype=dtype) for width in widths(spec))
    given = reset is not None and rng.random() < 0.5
    reset_state = tuple(torch.randn_like(s) for s in state) if given else ()
    kept = None if P else rng.choice([None, None, "units", "parts"])
    if kept == "units":
        zoneout = torch.rand(*rows, D, S, H) < 0.4
    elif kept == "parts":
        zoneout = torch.full((S,), 0.2, dtype=dtype)
    if rng.random() < 0.4:
        h_mask = (torch.rand(D, B, widths(spec)[0]) < 0.7).to(dtype) / 0.7
    options = {"bidirectional": bidirectional, "proj_size": P, "num_heads": spec.num_heads}
    module = fusedrnn.Recurrent(name, I, H, bias=spec.bias, **options, dtype=dtype)
    weights = tuple(w.detach() + 0.3 * torch.randn_like(w) for w in module._weights())
    noise = () if zoneout is h_mask is None else (LayerMasks(h=h_mask, zoneout=zoneout),)
    operands = Operands(torch.randn(*rows, I, dtype=dtype), state, reset_state, weights)
    return spec, operands, Masks(lengths, sizes, reset, noise)


def of_reference(spec, operands, masks, dtype=None):
    """The results, and the gradients of all operands for gradients drawn from a seed."""
    leaves = [t.to(dtype or t.dtype).detach().requires_grad_() for t in operands.flat()]
    outputs = reference.forward(spec, operands_of(spec, leaves), masks)
    d_outputs = gradients_like(outputs)
    return outputs, torch.autograd.grad(outputs, leaves, d_outputs, materialize_grads=True)


def of_loop(spec, operands, masks):
    outputs = loop.forward(spec, operands, masks)
    S = len(operands.state)
    outputs, kept = outputs[: 1 + S], outputs[1 + S :]
    assert [k.shape for k in kept] == [k.shape for k in loop.kept_like(spec, operands)]
    d_outputs = gradients_like(outputs)
    return outputs, loop.backward(spec, d_outputs, operands, masks, kept, d_input_wanted=True)


def gradients_like(outputs):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    return [d.to(o.dtype) for d, o in zip(drawn, outputs, strict=True)]


@pytest.mark.parametrize("chunk", [40, 1 << 17])  # elements: of a step or two; of all steps
@pytest.mark.parametrize("name", NAMES)
def test_every_cell_with_drawn_options(name, chunk, monkeypatch):
    monkeypatch.setattr(loop.jacobian, "CHUNK", chunk)
    for seed in range(chunk % 7, 40, 7):
        call = drawn(name, seed)
        (outputs, gradients), (expected, true) = of_loop(*call), of_reference(*call)
        told = f"{name}, seed {seed}: {call[0]}\n{{}}".format
        torch.testing.assert_close(outputs, list(expected), **VALUES64, msg=told)
        torch.testing.assert_close(gradients, list(true), **GRADIENTS64, msg=told)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh", "layer_norm_gru", "lstm_projected"])
def test_low_precision(name, dtype):
    """h is stored in the dtype, and rounded there alone: as the reference rounds it."""
    for seed in range(6):
        spec, operands, masks = drawn(name.removesuffix("_projected"), seed, torch.float32)
        operands = operands_of(spec, [t.to(dtype) for t in operands.flat()])
        if masks.layers and masks.layers[0].h is not None:
            masks = masks._replace(layers=(masks.layers[0]._replace(h=None),))
        plain = of_reference(spec, operands, masks)
        exact = of_reference(spec, operands, masks, torch.float64)
        for found, beside, true in zip(of_loop(spec, operands, masks), plain, exact, strict=True):
            for n, results in enumerate(zip(found, beside, true, strict=True)):
                assert_as_good(*results, f"{name}, seed {seed}, tensor {n}: {spec}")


@pytest.mark.parametrize("name", ["lstm", "gru", "layer_norm_gru"])
def test_the_ops(name):
    """What a compiler believes of them is so: shapes, dtypes, strides, no shared memory."""
    calls = [drawn(name, seed, torch.float32) for seed in range(8)]
    # With lengths, room for rows that do not exist is left as it was: no two runs have the same.
    for seed, (spec, operands, masks) in enumerate(c for c in calls if c[2].lengths is None):
        arguments = list(operands.flat()), masks.flat()
        torch.library.opcheck(torch.ops.fusedrnn.stack.default, (*arguments, *spec))
        outputs, end = loop.forward(spec, operands, masks), 1 + len(operands.state)
        given = gradients_like(outputs[:end]), *arguments, outputs[0], outputs[end:], seed % 2 == 0
        torch.library.opcheck(torch.ops.fusedrnn.stack_backward.default, (*given, *spec))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_a_training_step_of_a_module(name):
    """Two layers, two directions, dropout, zoneout, lengths, resets: one step after the other, as
    the reference with the same noise; the same bits again; a second derivative."""
    module = getattr(fusedrnn, name)(3, 4, 2, bidirectional=True, dropout=0.2, dtype=torch.float64)
    module.regularizers = fusedrnn.Regularizers(zoneout=0.1, recurrent_dropout=0.2, clip_gradient=1)
    x = torch.randn(5, 3, 3, dtype=torch.float64, requires_grad=True)
    reset = torch.rand(5, 3) < 0.3
    leaves = [x, *module.parameters()]

    def gradients(backend, **options):
        module.backend = backend
        torch.manual_seed(1)
        output, _ = module(x, lengths=[5, 0, 3], reset=reset)
        return torch.autograd.grad(output.square().sum(), leaves, **options)

    found, again, expected = gradients("loop"), gradients("loop"), gradients("reference")
    torch.testing.assert_close(found, expected, **GRADIENTS64)
    for one, other in zip(found, again, strict=True):
        assert_same(one, other, "a second run")
    # Clipping is not linear: clipped in two nodes, the parts of a second derivative are others.
    module.regularizers = fusedrnn.Regularizers(zoneout=0.1, recurrent_dropout=0.2)
    second = [
        torch.autograd.grad(gradients(backend, create_graph=True)[0].square().sum(), leaves)
        for backend in ("loop", "reference")
    ]
    torch.testing.assert_close(*second, **GRADIENTS64)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "SLSTM"])
def test_compiled(name):
    """One graph for any T, B and lengths, with one tensor as two states, and two layers of the
    same weights."""
    module = getattr(fusedrnn, name)(4, 4, 2)
    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(module, f"{kind}_l1", getattr(module, f"{kind}_l0"))
    leaves = list(module.parameters())

    def run(x, h, lengths):
        count = len(cells.get(name.lower()).states)
        return module(x, (h,) * count if count > 1 else h, lengths=lengths)[0].sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    module.backend = "loop"
    for T, B in ((5, 3), (7, 2)):
        x, h = torch.randn(T, B, 4, requires_grad=True), torch.randn(2, B, 4, requires_grad=True)
        lengths = torch.tensor([T, 2, 0][:B])
        found, expected = (
            torch.autograd.grad(f(x, h, lengths), [x, h, *leaves]) for f in (compiled, run)
        )
        torch.testing.assert_close(found, expected, **GRADIENTS32)


def test_a_reset_clears_nan_and_padding_is_not_read():
    for name in NAMES:
        spec = Spec(name, 3, 4, training=True, backend="loop")
        module = fusedrnn.Recurrent(name, 3, 4)
        x, (T, B) = torch.randn(4, 2, 3), (4, 2)
        x[0, 0], x[3, 1] = torch.nan, torch.nan
        reset = torch.zeros(T, B, dtype=torch.bool)
        reset[1, 0] = True
        state = tuple(torch.zeros(1, B, 4) for _ in cells.get(name).states)
        weights = tuple(w.detach() for w in module._weights())
        masks = Masks(torch.tensor([4, 3]), None, reset)
        output, *final = loop.forward(spec, Operands(x, state, (), weights), masks)[
            : 1 + len(state)
        ]
        assert output[1:].isfinite().all(), name
        assert all(s.isfinite().all() for s in final), name


def test_when_auto_takes_it():
    def backend(name, T=50, B=8, H=64, *, training=True, **options):
        module = getattr(fusedrnn, name)(4, H).train(training)
        return fusedrnn.explain(module, torch.randn(T, B, 4), **options).backend

    assert [backend(n) for n in ("LSTM", "GRU", "RNN", "SLSTM")] == ["aten", "loop", "loop", "loop"]
    assert backend("GRU", training=False) == backend("GRU", T=4) == "aten"
    assert backend("GRU", B=600) == "aten"
    assert backend("GRU", B=600, lengths=[50] * 600) == "loop"
    assert backend("GRU", B=0) == "aten"
    assert backend("SLSTM", B=0) == "reference"
    for share, chosen in ((0.3, "aten"), (0.5, "loop")):
        reset = torch.zeros(50, 128, dtype=torch.bool)
        reset[: int(50 * share), 3] = True
        assert backend("LSTM", B=128, reset=reset) == chosen
        assert backend("LSTM", B=8, reset=reset[:, :8]) == "aten"
        assert backend("LSTM", B=128, reset=reset, training=False) == "aten"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert backend("GRU") == "aten"
    assert dispatch.BACKENDS == ("triton", "aten", "loop", "reference")
    refused = fusedrnn.explain(
        fusedrnn.GRU(3, 4, device="meta"), torch.empty(5, 2, 3, device="meta")
    )
    assert "not on meta" in refused.passed_over["loop"]


# ---- what a stranger met

GRUS = [("GRU", {}), ("LSTM", {"backend": "loop"})]


@pytest.mark.parametrize(("kind", "options"), GRUS)
def test_a_default_device_changes_nothing(kind, options):
    """Also for what is remembered of a batch: the orders of its rows."""
    module = getattr(fusedrnn, kind)(3, 4, bidirectional=True, **options)
    x, lengths = torch.randn(31, 3, 3), torch.tensor([31, 7, 0])
    reset = torch.rand(31, 3) < 0.2
    for given in ({}, {"lengths": lengths, "reset": reset}):
        with torch.device("meta"):
            output, _ = module(x, **given)
            output.sum().backward()
        found = [p.grad.clone() for p in module.parameters()]
        module.zero_grad()
        expected, _ = module(x, **given)
        expected.sum().backward()
        assert torch.equal(output, expected)
        for a, p in zip(found, module.parameters(), strict=True):
            assert torch.equal(a, p.grad)
        module.zero_grad()


def test_the_output_may_be_changed_in_place():
    module = fusedrnn.GRU(3, 4)
    x = torch.randn(30, 2, 3, requires_grad=True)
    assert fusedrnn.explain(module, x).backend == "loop"
    (expected,) = torch.autograd.grad(module(x)[0].relu().sum(), x)
    (found,) = torch.autograd.grad(module(x)[0].relu_().sum(), x)
    assert torch.equal(found, expected)


def test_a_batch_of_gradients():
    module = fusedrnn.GRU(3, 4)
    x = torch.randn(30, 2, 3, requires_grad=True)
    output, _ = module(x)
    cotangents = torch.randn(5, *output.shape)
    (found,) = torch.autograd.grad(output, x, cotangents, is_grads_batched=True, retain_graph=True)
    for one, cotangent in zip(found, cotangents, strict=True):
        (expected,) = torch.autograd.grad(output, x, cotangent, retain_graph=True)
        torch.testing.assert_close(one, expected, **GRADIENTS32)
        assert not one.requires_grad


def test_backward_inside_autocast_computes_as_forward_did():
    for cell in ("gru", "layer_norm_lstm"):
        module = fusedrnn.Recurrent(cell, 3, 4, backend="loop")
        output, _ = module(torch.randn(7, 2, 3))
        expected = torch.autograd.grad(output.sum(), module.parameters(), retain_graph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = torch.autograd.grad(output.sum(), module.parameters())
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def test_the_dtype_under_autocast_does_not_depend_on_the_resets():
    module, x = fusedrnn.LSTM(3, 512), torch.randn(10, 16, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        few, many = (
            module(x, lengths=[10] * 16, reset=torch.full((10, 16), on))[0].dtype
            for on in (False, True)
        )
    assert few == many


def test_zoneout_keeps_a_unit_beside_an_infinity():
    module = fusedrnn.RNN(1, 2, nonlinearity="relu", zoneout=0.5)
    with torch.no_grad():
        module.weight_hh_l0.copy_(torch.eye(2) * 1e30)
        module.weight_ih_l0.fill_(1)
        module.bias_ih_l0.zero_()
        module.bias_hh_l0.zero_()
    x, outputs = torch.rand(6, 3, 1) * 1e10, []
    for backend in ("reference", "loop"):
        module.backend = backend
        torch.manual_seed(0)
        outputs.append(module(x)[0])
    assert outputs[0].isinf().any()
    assert torch.equal(outputs[0].isfinite(), outputs[1].isfinite())
    assert torch.equal(outputs[0].isnan(), outputs[1].isnan())


def test_a_reset_mask_of_inference_mode():
    """As a rollout leaves it."""
    with torch.inference_mode():
        reset = torch.rand(30, 2) < 0.2
    module = fusedrnn.GRU(3, 4)
    x = torch.randn(30, 2, 3)
    found = torch.autograd.grad(module(x, reset=reset)[0].sum(), module.parameters())
    expected = torch.autograd.grad(module(x, reset=reset.clone())[0].sum(), module.parameters())
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)

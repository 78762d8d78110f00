"""fusedrnn.Recurrent: one module for any registered cell; and heads, which torch does not have."""

import copy
import dataclasses
import inspect
import io
import pickle

import pytest
import torch
from tolerances import GRADIENTS64, VALUES32, VALUES64, assert_same
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import fusedrnn
from fusedrnn import Recurrent, cells, functional, modules
from fusedrnn.cells.vocabulary import sigmoid, tanh, zeros_like

T, B, I, H = 5, 3, 4, 6
TORCHS = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}
# One cell of each kind: a stage, two, three with means, a diagonal, four states; with heads, too.
KINDS = {name: (name, {}) for name in ("lstm", "rnn_relu", "gru_reset_before", "slstm")}
KINDS |= {name: (name, {}) for name in ("layer_norm_lstm", "indrnn_relu")}
KINDS |= {f"{name}-heads": (name, {"num_heads": 3}) for name in ("lstm", "gru_reset_before")}
# (Two values have a variance near 0 too easily: normalised heads have three units.)
KINDS |= {"layer_norm_lstm-heads": ("layer_norm_lstm", {"num_heads": 2})}
KINDS |= {"lstm-projected": ("lstm", {"proj_size": 2})}
KINDS |= {"widths": ("mlp_transition(layer_sizes=(3, 8), negative_slope=0.1)", {})}
EVERY = KINDS | {name: (name, {}) for name in cells.REGISTRY}
EVERY |= {f"{n}-projected": (n, {"proj_size": 2}) for n, c in cells.REGISTRY.items() if c.projects}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_cell = pytest.mark.parametrize("cell", cells.REGISTRY)
of_torch = pytest.mark.parametrize("cell", [n for n, c in cells.REGISTRY.items() if c.aten])


def make(kind, num_layers=2, **options):
    cell, own = EVERY.get(kind) or (kind, {})
    options = {"dtype": torch.float64, **own, **options}
    return Recurrent(cell, I, H, num_layers, **options)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def flat(results):
    return torch.utils._pytree.tree_leaves(results)


def assert_close(found, expected, **tolerance):
    found, expected = flat(found), flat(expected)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **(tolerance or VALUES64))


def random_state(module, batch=B):
    rows = module.num_layers * (2 if module.bidirectional else 1)
    names = cells.get(module.mode.lower()).states
    widths = [module.proj_size or H] + [H] * (len(names) - 1)
    state = tuple(double(rows, batch, width) for width in widths)
    return state if len(state) > 1 else state[0]


# ---------------------------------------------------------------------- oracles, from equations


def assert_same_values_and_gradients(module, x, hx, oracle):
    """The module against oracle(parameters by name, x, hx): values, and the gradients of the input,
    the initial states and all parameters, from random cotangents of the output and final states."""
    leaves = [x, *flat(hx), *module.parameters()]
    for leaf in leaves:
        leaf.requires_grad_()
    results = flat(module(x, hx))
    expected = flat(oracle(dict(module.named_parameters()), x, hx))
    assert_close(results, expected)
    cotangents = [torch.randn_like(r) for r in results]
    found = torch.autograd.grad(results, leaves, cotangents)
    assert_close(found, torch.autograd.grad(expected, leaves, cotangents), **GRADIENTS64)


def layers_by(run_layer, module):
    """An oracle of the whole stack from one of a layer and direction: run_layer(weights, x [T, B,
    *], state) -> (outputs, final state), in which a state is a tuple."""

    def oracle(parameters, x, hx):
        hx = hx if isinstance(hx, tuple) else (hx,)
        finals = []
        for layer in range(module.num_layers):
            outputs = []
            for end in ("", "_reverse")[: 2 if module.bidirectional else 1]:
                own = f"_l{layer}{end}"
                weights = {n.removesuffix(own): p for n, p in parameters.items() if n.endswith(own)}
                state = tuple(s[len(finals)] for s in hx)
                ordered = x.flip(0) if end else x
                output, final = run_layer(weights, ordered, state)
                outputs.append(output.flip(0) if end else output)
                finals.append(final)
            x = torch.cat(outputs, -1)
        return x, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))

    return oracle


def gru_of_2014(w, x, state):
    """Cho et al. 2014, eqs. 5-8, unit by unit where the state enters."""
    (h,), outputs = state, []
    W_r, W_z, W = w["weight_ih"].split(H)
    U_r, U_z, U = w["weight_hh"].split(H)
    b_r, b_z, b = (w["bias_ih"] + w["bias_hh"]).split(H)
    for x_t in x:
        r = 1 / (1 + torch.exp(-(x_t @ W_r.T + h @ U_r.T + b_r)))
        z = 1 / (1 + torch.exp(-(x_t @ W_z.T + h @ U_z.T + b_z)))
        candidate = torch.tanh(x_t @ W.T + (r * h) @ U.T + b)
        h = z * h + (1 - z) * candidate
        outputs.append(h)
    return torch.stack(outputs), (h,)


def lstmp_of_2014(w, x, state):
    """Sak et al. 2014, eqs. 1-7, without peepholes: the recurrent projection r_t = W_rm m_t."""
    r, c = state
    outputs = []
    for x_t in x:
        a = x_t @ w["weight_ih"].T + w["bias_ih"] + r @ w["weight_hh"].T + w["bias_hh"]
        i, f, g, o = a.split(H, -1)
        c = c / (1 + torch.exp(-f)) + torch.tanh(g) / (1 + torch.exp(-i))
        m = torch.tanh(c) / (1 + torch.exp(-o))
        r = m @ w["weight_hr"].T
        outputs.append(r)
    return torch.stack(outputs), (r, c)


def norm_gru_of_2021(heads):
    """Hafner et al. 2021: the GRU of DreamerV2, all gates normalised together, in every head."""

    def run(w, x, state):
        (h,), outputs = state, []
        per_head = w["weight_hh"].view(heads, -1, H // heads)
        scale, shift = w["weight_ln"].view(3, H), w["bias_ln"].view(3, H)
        for x_t in x:
            parts = [h_k @ W.T for h_k, W in zip(h.chunk(heads, -1), per_head, strict=True)]
            a = torch.stack([p.unflatten(-1, (3, -1)) for p in parts], -2)  # [B, 3, heads, *]
            a = a + (x_t @ w["weight_ih"].T + w["bias_ih"] + w["bias_hh"]).view(a.shape)
            rows = a.transpose(1, 2).flatten(2)  # [B, heads, 3 * *]
            rows = nn.functional.layer_norm(rows, rows.shape[-1:], eps=1e-3)
            y = rows.view(a.transpose(1, 2).shape).transpose(1, 2).flatten(2) * scale + shift
            r, z = torch.sigmoid(y[:, 0]), torch.sigmoid(y[:, 1] - 1)
            h = z * torch.tanh(r * y[:, 2]) + (1 - z) * h
            outputs.append(h)
        return torch.stack(outputs), (h,)

    return run


def side_by_side(cell, heads, with_bias=True):
    """`heads` modules of torch.nn of size H / heads, each with its own part of the state."""
    size = H // heads

    def of_head(tensor, k):
        """The rows of head k in every gate's block."""
        return tensor.unflatten(0, (-1, heads, size))[:, k].flatten(0, 1)

    def run(w, x, state):
        options = {"nonlinearity": cell[4:]} if cell.startswith("rnn_") else {}
        kind = getattr(nn, TORCHS[cell])
        outputs, finals = [], []
        for k in range(heads):
            module = kind(x.shape[-1], size, bias=with_bias, dtype=x.dtype, **options)
            own = {"weight_ih_l0": of_head(w["weight_ih"], k), "weight_hh_l0": w["weight_hh"][k]}
            if with_bias:
                own |= {f"{n}_l0": of_head(w[n], k) for n in ("bias_ih", "bias_hh")}
            hx = tuple(s[None, :, k * size : (k + 1) * size] for s in state)
            output, final = torch.func.functional_call(
                module, own, (x, hx if len(hx) > 1 else hx[0])
            )
            outputs.append(output)
            finals.append(tuple(f[0] for f in flat(final)))
        return torch.cat(outputs, -1), tuple(torch.cat(f, -1) for f in zip(*finals, strict=True))

    return run


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_gru_reset_before_is_the_papers(num_layers, bidirectional):
    module = make("gru_reset_before", num_layers, bidirectional=bidirectional, backend="reference")
    oracle = layers_by(gru_of_2014, module)
    assert_same_values_and_gradients(module, double(T, B, I), random_state(module), oracle)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_projected_lstm_is_the_papers(num_layers, bidirectional):
    module = make("lstm-projected", num_layers, bidirectional=bidirectional, backend="reference")
    oracle = layers_by(lstmp_of_2014, module)
    assert_same_values_and_gradients(module, double(T, B, I), random_state(module), oracle)


@pytest.mark.parametrize("heads", [1, 2])
def test_a_stage_that_receives_means(heads):
    module = make("layer_norm_gru", bidirectional=True, num_heads=heads)
    oracle = layers_by(norm_gru_of_2021(heads), module)
    assert_same_values_and_gradients(module, double(T, B, I), random_state(module), oracle)


@of_torch
@pytest.mark.parametrize("heads", [2, 3, 6])
def test_heads_are_networks_side_by_side(cell, heads):
    module = make(cell, 2, num_heads=heads, bidirectional=True, backend="reference")
    oracle = layers_by(side_by_side(cell, heads), module)
    assert_same_values_and_gradients(module, double(T, B, I), random_state(module), oracle)


def test_heads_without_bias():
    module = make("lstm", 1, num_heads=2, bias=False)
    oracle = layers_by(side_by_side("lstm", 2, with_bias=False), module)
    assert_same_values_and_gradients(module, double(T, B, I), random_state(module), oracle)


def test_one_head_of_each_unit():
    """H heads: weight_hh is diagonal, and the whole network runs unit by unit."""
    module = make("rnn_tanh", 1, num_heads=H)
    dense = make("rnn_tanh", 1)
    weights = module.state_dict()
    weights["weight_hh_l0"] = torch.diag(module.weight_hh_l0[:, 0, 0]).detach()
    dense.load_state_dict(weights)
    x = double(T, B, I)
    assert_close(module(x), dense(x))


# ------------------------------------------------------------------------------- every cell


# What the cells have of their own, in units of H, and where that starts.
OWN = {
    "peephole_lstm": {"weight_ci": 1, "weight_cf": 1, "weight_co": 1},
    "layer_norm_gru": {"weight_ln": 3, "bias_ln": 3},
    "layer_norm_lstm": {"weight_ln_ih": 4, "weight_ln_hh": 4, "weight_ln_c": 1, "bias_ln_c": 1},
}


MATRICES = {
    "peephole_lstm_full": dict.fromkeys(("weight_ci", "weight_cf", "weight_co"), (H, H)),
    "mlp_transition": {
        "weight_mlp1": (100, 100), "bias_mlp1": (100,), "weight_mlp2": (H, 100), "bias_mlp2": (H,),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in EVERY if kind != "widths"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_parameters_and_their_start(kind, bidirectional):
    cell, own = EVERY[kind]
    module = make(kind, bidirectional=bidirectional)
    G, D, heads = len(cells.get(cell).gates), 1 + bidirectional, own.get("num_heads", 1)
    P = own.get("proj_size", H)
    expected, rows = {}, 100 if cell == "mlp_transition" else G * H
    for layer in range(2):
        for end in ("", "_reverse")[:D]:
            end = f"_l{layer}{end}"
            expected[f"weight_ih{end}"] = (rows, I if layer == 0 else D * P)
            square = (heads, G * H // heads, H // heads)
            expected[f"weight_hh{end}"] = square if heads > 1 else (rows, P)
            if "indrnn" in cell:
                expected[f"weight_hh{end}"] = (H,)
            expected[f"bias_ih{end}"] = expected[f"bias_hh{end}"] = (rows,)
            if P != H:
                expected[f"weight_hr{end}"] = (P, H)
            expected |= {name + end: (n * H,) for name, n in OWN.get(cell, {}).items()}
            expected |= {name + end: shape for name, shape in MATRICES.get(cell, {}).items()}
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == expected
    assert list(expected) == [name for group in module._all_weights for name in group]
    assert [p.shape for group in module.all_weights for p in group] == list(expected.values())
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in module.parameters())
    constant = {n: float(n.startswith("weight")) for n in expected if "_ln" in n}
    for name, p in module.named_parameters():
        if name in constant:
            assert (p == constant[name]).all()
        elif "indrnn" in cell and "weight_hh" in name:
            assert (p >= 0).all()
            assert H**-0.5 < p.max() <= 1
        else:
            assert p.abs().max() <= (100 if "_mlp" in name else H) ** -0.5
    assert module.mode == cell.upper()
    assert all(a is b for a, b in zip(module._flat_weights, module.parameters(), strict=True))
    assert ("num_heads" in vars(module)) == (heads > 1)
    before = {name: p.clone() for name, p in module.named_parameters()}
    module.reset_parameters()
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name]) == (name in constant)


@of_torch
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}])
def test_a_cell_of_torch_is_torchs_module_bit_for_bit(cell, options):
    classes = [getattr(place, TORCHS[cell]) for place in (nn, fusedrnn)]
    own = {"nonlinearity": cell[4:]} if cell.startswith("rnn_") else {}
    made = []
    for build in (*classes, Recurrent):
        torch.manual_seed(4)
        first = (cell,) if build is Recurrent else ()
        made.append(build(*first, I, H, **options, **({} if first else own)))
    x = torch.randn(T, B, I)
    for module in made[1:]:
        assert list(module.state_dict()) == list(made[0].state_dict())
        for one, other in zip(module.parameters(), made[0].parameters(), strict=True):
            assert_same(one, other, "parameter")
        for one, other in zip(flat(module(x)), flat(made[0](x)), strict=True):
            assert_same(one, other, "result")


@every_kind
def test_copies_pickles_and_state_dicts(kind):
    module = make(kind, bidirectional=True, zoneout=0.0 if "proj" in kind else 0.1)
    x, hx = double(T, B, I), random_state(module)
    expected = module.eval()(x, hx)
    saved = io.BytesIO()
    torch.save(module.state_dict(), saved)
    saved.seek(0)
    fresh = make(kind, bidirectional=True).eval()
    fresh.load_state_dict(torch.load(saved))
    fresh.regularizers = module.regularizers
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh):
        assert twin.num_heads == module.num_heads
        assert repr(twin) == repr(module)
        for one, other in zip(flat(twin(x, hx)), flat(expected), strict=True):
            assert_same(one, other, kind)
    weights = {name: 0.5 * p for name, p in module.named_parameters()}
    called = torch.func.functional_call(module, weights, (x, hx))
    fresh.load_state_dict(weights)
    assert_close(called, fresh(x, hx))


@every_kind
def test_moving_to_another_dtype_and_device(kind):
    module = make(kind, num_layers=1)
    single = copy.deepcopy(module).float()
    assert {p.dtype for p in single.parameters()} == {torch.float32}
    x = double(T, B, I)
    assert_close(single(x.float())[0], module(x)[0].float(), **VALUES32)
    assert {p.device.type for p in module.to("meta").parameters()} == {"meta"}
    assert module(x.to("meta"))[0].shape == (T, B, module.proj_size or H)
    assert {p.device.type for p in make(kind, device="meta").parameters()} == {"meta"}


@every_kind
def test_steps_and_streams_are_the_sequence(kind):
    module = make(kind)
    x, state = double(T, B, I), random_state(module)
    expected, final = module(x, state)
    stream, outputs = module.stream(state), []
    for x_t in x:
        output, state = module.step(x_t, state)
        outputs.append(output)
    assert_close(torch.stack(outputs), expected)
    assert_close(state, final)
    assert_close(torch.cat([stream(x[:2]), stream.step(x[2])[None], stream(x[3:])]), expected)
    assert_close(stream.state, final)
    single, one = module.step(x[0, 0])
    assert_close(single, module(x[:1, 0])[0][0])
    assert flat(one)[0].dim() == 2


@every_kind
def test_lengths_resets_and_packed_rows(kind):
    module = make(kind, bidirectional=True)
    x, hx, lengths = double(T, B, I), random_state(module), [5, 3, 1]
    output, final = module(x, hx, lengths=lengths)
    packed, packed_final = module(pack_sequence([x[:n, b] for b, n in enumerate(lengths)]), hx)
    unpacked, _ = nn.utils.rnn.pad_packed_sequence(packed)
    assert_close((output, final), (unpacked, packed_final))
    for b, n in enumerate(lengths):
        own = tuple(h[:, b : b + 1].contiguous() for h in flat(hx))
        alone, end = module(x[:n, b : b + 1], own if len(own) > 1 else own[0])
        assert_close(output[:n, b], alone[:, 0])
        assert_close([f[:, b] for f in flat(final)], [f[:, 0] for f in flat(end)])
    # A reset of all rows between two steps cuts a layer in two; in a stack the layers above too.
    one = make(kind, num_layers=1)
    starts = torch.zeros(T, B, dtype=torch.bool)
    starts[2] = True
    given = random_state(one)
    output, final = one(x, reset=(starts, given))
    assert_close(output, torch.cat([one(x[:2])[0], one(x[2:], given)[0]]))
    assert_close(final, one(x[2:], given)[1])


@every_kind
def test_states_regularisers_and_explain(kind):
    module = make(kind, recurrent_dropout=0.3, weight_drop=0.3, input_dropout=0.3)
    if "proj" not in kind:
        module.regularizers = fusedrnn.Regularizers(recurrent_dropout=0.3, zoneout=0.2)
    x = double(T, B, I)
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(module(x)[0])
    assert_same(*drawn, "the same seed")
    assert not torch.equal(drawn[0], copy.deepcopy(module).eval()(x)[0])
    drawn[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    module.regularizers = None
    output, final, states = module(x, return_states=True)
    assert list(states) == list(cells.get(module.mode.lower()).states)
    assert_close([s[:, -1] for s in states.values()], list(flat(final)))
    assert_close(states["h"][-1], output)
    said = fusedrnn.explain(module, x)
    lacking = module._torch_lacks()
    assert said.backend == ("loop" if lacking else "aten")
    assert said.passed_over.get("aten") == lacking
    norms = fusedrnn.gradient_flow.sensitivity(module, x, at=[-1])
    assert norms.shape == (1, T, B)
    flow = fusedrnn.gradient_flow.state_gradients(module, x, lambda output: output[-1].sum())
    assert list(flow.norms) == list(states)


def test_weight_drop_and_recurrent_dropout_with_heads():
    """In evaluation nothing is dropped; with p near 1 all of weight_hh is."""
    module = make("gru", 1, num_heads=2, weight_drop=1 - 1e-12)
    x = double(T, B, I)
    without = copy.deepcopy(module).eval()
    with torch.no_grad():
        without.weight_hh_l0.zero_()
    assert_close(module(x), without(x))


@pytest.mark.parametrize("kind", [*KINDS, "peephole_lstm_full"])  # of two matrices as one
def test_compiles_in_one_graph(kind):
    module = make(kind, num_layers=1)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, twin = double(T, B, I), copy.deepcopy(module)
    for leaf, run in ((x, compiled), (x.clone(), twin)):
        leaf.requires_grad_()
        output, final = run(leaf)
        (output.square().sum() + sum(f.sum() for f in flat(final))).backward()
    assert_close(compiled(x), twin(x))
    assert_close(
        [p.grad for p in module.parameters()], [p.grad for p in twin.parameters()], **GRADIENTS64
    )


@every_kind
def test_the_functional_form(kind):
    cell, own = KINDS[kind]
    module = make(kind, bidirectional=True)
    x, hx = double(T, B, I), random_state(module)
    state = hx if isinstance(hx, tuple) else (hx,)
    options = {"num_layers": 2, "bidirectional": True, **own}
    found = functional.recurrent(cell, x, state, module.parameters(), hidden_size=H, **options)
    assert_close(found, module(x, hx))


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_the_functional_forms_find_the_size_with_heads(cell):
    module = getattr(fusedrnn, cell.upper())(I, H, num_heads=2)
    x = torch.randn(T, B, I)
    found = getattr(functional, cell)(x, None, module.parameters(), num_heads=2)
    assert_close(found, module(x), **VALUES32)


# ------------------------------------------------------------- torch's names, with heads; misuse


def test_heads_of_torchs_names():
    module = fusedrnn.LSTM(I, H, 2, num_heads=2, forget_bias=1.0)
    assert "num_heads=2" in repr(module)
    assert module.weight_hh_l0.shape == (2, 4 * H // 2, H // 2)
    assert (module.bias_ih_l1[H : 2 * H] == 1).all()
    assert not (module.bias_ih_l1[:H] == 1).any()
    with pytest.raises(RuntimeError, match="size mismatch for weight_hh_l0"):
        module.load_state_dict(nn.LSTM(I, H, 2).state_dict())
    assert repr(Recurrent("gru_reset_before", I, H)) == "Recurrent('gru_reset_before', 4, 6)"
    assert repr(fusedrnn.GRU(I, H)) == repr(nn.GRU(I, H))


def test_it_takes_what_torchs_class_had():
    """Modules that torch pickled, or that replace_modules turned into ours, have no num_heads."""
    model = nn.GRU(I, H)
    fusedrnn.replace_modules(model)
    assert model.num_heads == 1
    assert "num_heads" not in vars(model)


@pytest.mark.parametrize(
    ("cell", "options", "message"),
    [
        ("elman", {}, r"cell must be one of \['coupled_lstm', .*got 'elman'"),
        ("gru", {"num_heads": 4}, "num_heads: expected a divisor of hidden_size=6, got 4"),
        ("gru", {"num_heads": 0}, "num_heads: expected a divisor of hidden_size=6, got 0"),
        ("gru", {"num_heads": -2}, "num_heads: expected a divisor of hidden_size=6, got -2"),
        ("gru", {"num_heads": True}, "num_heads: expected an int, got True"),
        ("gru", {"num_heads": 2.0}, "num_heads: expected an int, got 2.0"),
        ("lstm", {"num_heads": 2, "proj_size": 3}, "num_heads: expected 1 beside proj_size=3"),
        (
            "gru_reset_before",
            {"proj_size": 3},
            "since only lstm, .* can project, got 3 for gru_reset_before",
        ),
    ],
)
def test_misuse(cell, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Recurrent(cell, I, H, **options)
    weights = [torch.zeros(())]
    with pytest.raises((TypeError, ValueError), match=message):
        functional.recurrent(cell, torch.zeros(T, B, I), None, weights, hidden_size=H, **options)


@every_cell
def test_what_torchs_constructor_refuses(cell):
    for options in ({"hidden_size": 0}, {"num_layers": 0}, {"input_size": -1}, {"dropout": 2.0}):
        for heads in (1, 2):
            with pytest.raises(ValueError, match=r"greater than zero|in range"):
                Recurrent(
                    cell, **{"input_size": I, "hidden_size": H, "num_heads": heads, **options}
                )
    with pytest.raises(ValueError, match="save must be one of"):
        Recurrent(cell, I, H, save="all")
    with pytest.raises(ValueError, match="zoneout: expected one probability or"):
        Recurrent(cell, I, H, zoneout=(0.1, 0.1, 0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": "6", "num_layers": 2}, "hidden_size: expected an int, got '6'"),
        ({"num_layers": 2.0}, r"num_layers: expected an int, got 2\.0"),
        ({"num_layers": -2}, "num_layers: expected at least 1, got -2"),
        ({"proj_size": None}, "proj_size: expected an int, got None"),
        ({"dropout": "a"}, "dropout: expected a probability, from 0 to 1, got 'a'"),
        ({"dropout": 3.0}, r"dropout: expected a probability, from 0 to 1, got 3\.0"),
    ],
)
def test_sizes_of_a_functional_call(options, message):
    options = {"hidden_size": H, **options}
    with pytest.raises((TypeError, ValueError), match=message):
        functional.recurrent("gru_reset_before", torch.zeros(T, B, I), None, [], **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["gru"], I, H), r"cell must be one of .* got \['gru'\]"),
        (("gru", I, H, 2.0), r"num_layers: expected an int, got 2\.0"),
        (("lstm", I, H, 1, True, False, 0.0, False, None), "proj_size: expected an int, got None"),
    ],
)
def test_sizes_of_a_module(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Recurrent(*arguments)


@pytest.mark.parametrize(
    "weight", [torch.ones(18, 6), torch.ones(3, 6, 2), torch.ones(2, 9, 3, dtype=torch.float32)]
)
def test_a_weight_that_was_replaced_by_another_kind(weight):
    """The reference could run what has other heads, and would: the kernels could not."""
    module = make("gru", 1, num_heads=2)
    module.weight_hh_l0 = nn.Parameter(weight if weight.dim() == 3 else weight.double())
    with pytest.raises((RuntimeError, ValueError), match=r"gru: weights\[1\]: expected"):
        module(double(T, B, I))


def test_calls_that_do_not_fit():
    module = make("gru_reset_before", 1)
    with pytest.raises(RuntimeError, match=r"Recurrent: hx \(h_0\): expected shape \(1, 3, 6\)"):
        module(double(T, B, I), double(1, B, 5))
    with pytest.raises(RuntimeError, match=r"Recurrent: input: .* input_size=4"):
        module(double(T, B, 7))
    weights = fusedrnn.GRU(I, H).parameters()
    with pytest.raises(RuntimeError, match=r"shape \(3, 6, 2\) for hidden_size=6 and num_heads=3"):
        functional.gru(torch.zeros(T, B, I), None, weights, num_heads=3)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (make("gru_reset_before"), "torch has no gru_reset_before"),
        (make("lstm-heads"), "torch's operators have no heads"),
        (fusedrnn.GRU(I, H, num_heads=2, dtype=torch.float64), "torch's operators have no heads"),
    ],
    ids=["cell", "heads", "GRU"],
)
def test_what_torch_lacks_is_said_everywhere(module, why):
    with pytest.raises(TypeError, match=f"torch.jit.script .* cannot stand in for this one: {why}"):
        torch.jit.script(module)
    model = nn.Sequential(module)
    assert fusedrnn.restore_modules(model).left == {"0": why}
    assert fusedrnn.replace_modules(model) == ({}, {})
    with (
        fusedrnn.use_backend("aten"),
        pytest.raises(RuntimeError, match=f"'aten' was asked for and cannot run this call: {why}"),
    ):
        module(double(T, B, I))
    with fusedrnn.use_backend("aten"), pytest.raises(RuntimeError, match=why):
        module.step(double(B, I))


def test_another_cell_by_an_operator_of_torch():
    """torch.nn's modules, and cuDNN, know a mode only under torch's own name."""
    cells.register(dataclasses.replace(cells.get("lstm"), name="renamed"))
    try:
        module, x = make("lstm", 1), double(T, B, I)
        renamed = Recurrent("renamed", I, H, dtype=torch.float64)
        renamed.load_state_dict(module.state_dict())
        assert_close(renamed(x), module(x))
        assert fusedrnn.explain(renamed, x).backend == "aten"
        assert fusedrnn.restore_modules(renamed).left == {"": "torch.nn has no renamed"}
    finally:
        del cells.REGISTRY["renamed"]


@every_kind
def test_only_what_cudnn_knows_is_flattened(kind, monkeypatch):
    module, flattened = make(kind), []
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda self: flattened.append(self))
    module.flatten_parameters()
    module.double()
    assert bool(flattened) == (module._torch_lacks() is None)
    reversed_too = Recurrent("lstm", I, H, 2, direction="alternate", residual=True)
    reversed_too.flatten_parameters()
    assert reversed_too in flattened  # layer by layer they are cuDNN's


@of_torch
def test_a_recurrent_of_torchs_cell_can_be_restored(cell):
    model = nn.Sequential(Recurrent(cell, I, H))
    x = torch.randn(T, B, I)
    expected = model(x)
    report = fusedrnn.restore_modules(model)
    assert report.swapped == {"0": f"fusedrnn.Recurrent -> torch.nn.{TORCHS[cell]}"}
    assert type(model[0]) is modules.torch_class(cell)
    assert_close(model(x), expected, **VALUES32)
    assert set(vars(getattr(nn, TORCHS[cell])(I, H))) == set(vars(model[0]))
    fusedrnn.replace_modules(model)
    assert type(model[0]) is getattr(fusedrnn, TORCHS[cell])


def test_script_of_a_recurrent():
    class Model(nn.Module):
        def __init__(self, rnn: nn.Module):
            super().__init__()
            self.rnn = rnn

        def forward(self, x: torch.Tensor):
            return self.rnn(x)

    module, x = Recurrent("gru", I, H), torch.randn(T, B, I)
    assert_close(torch.jit.script(Model(module))(x), module(x), **VALUES32)
    with pytest.raises(TypeError, match=r"two states: use fusedrnn\.LSTM"):
        torch.jit.script(Model(Recurrent("lstm", I, H)))


# ------------------------------------------------------------------------- a cell of one's own


def peephole_forward(x_gates, h_gates, state, params):
    """A cell with three states and parameters of its own, which no cell of ours has."""
    (p, q), (_h, c, m) = params, state
    f = sigmoid(x_gates[0] + h_gates[0] + p * c)
    g = tanh(x_gates[1] + h_gates[1] + q * m)
    c_new = f * c + (1 - f) * g
    return (c_new, c_new, f * m + c), (f, g)


def peephole_backward(d_state, saved, prev, new, params):
    (dh, dc, dm), (f, g), (p, q), (_h, c, m) = d_state, saved, params, prev
    d_c = dh + dc
    df = (d_c * (c - g) + dm * m) * f * (1 - f)
    dg = d_c * (1 - f) * (1 - g * g)
    d_prev = (zeros_like(dh), d_c * f + dm + df * p, dm * f + dg * q)
    return (df, dg), (df, dg), d_prev, (df * c, dg * m)


@pytest.fixture
def peephole():
    cell = cells.Cell(
        name="peephole", states=("h", "c", "m"), stages=(
            cells.Stage(
                cells.Linear(("f", "g")), peephole_forward, peephole_backward, additive=True,
                saved=("f", "g"), own=(cells.Own("look"), cells.Own("weigh")),
            ),
        ),
    )  # fmt: skip
    yield cells.register(cell)
    del cells.REGISTRY["peephole"]


def peephole_by_hand(w, x, state):
    h, c, m = state
    outputs = []
    for x_t in x:
        a = x_t @ w["weight_ih"].T + w["bias_ih"] + h @ w["weight_hh"].T + w["bias_hh"]
        f = 1 / (1 + torch.exp(-(a[:, :H] + w["look"] * c)))
        g = torch.tanh(a[:, H:] + w["weigh"] * m)
        h = f * c + (1 - f) * g
        c, m = h, f * m + c
        outputs.append(h)
    return torch.stack(outputs), (h, c, m)


@pytest.mark.parametrize("by_name", [True, False])
def test_a_cell_with_parameters_and_three_states(peephole, by_name):
    cell = "peephole" if by_name else peephole
    module = Recurrent(cell, I, H, 2, bidirectional=True, zoneout=(0.0, 0.0, 0.0), **F64)
    assert module.look_l1_reverse.shape == (H,)
    assert [n for n in module.state_dict() if n.endswith("l0")] == [
        "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "look_l0", "weigh_l0"
    ]  # fmt: skip
    x, hx = double(T, B, I), tuple(double(4, B, H) for _ in range(3))
    assert_same_values_and_gradients(module, x, hx, layers_by(peephole_by_hand, module))
    with torch.no_grad():
        twin = pickle.loads(pickle.dumps(module))
        assert_close(twin(x, hx), module(x, hx))
    with_heads = Recurrent(cell, I, H, num_heads=2, **F64)
    state = None
    for x_t in x:
        output, state = with_heads.step(x_t, state)
    assert_close(output, with_heads(x)[0][-1])


def test_a_cell_that_is_not_the_registered_one(peephole):
    stranger = cells.Cell("peephole", ("h",), cells.get("rnn_tanh").stages)
    with pytest.raises(ValueError, match="expected the one that is registered as 'peephole'"):
        Recurrent(stranger, I, H)


F64 = {"dtype": torch.float64}


def test_the_signature_is_that_of_torchs_names():
    """What LSTM takes, Recurrent takes, after the cell."""
    own = list(inspect.signature(Recurrent).parameters)
    lstm = [n for n in inspect.signature(fusedrnn.LSTM).parameters if n != "forget_bias"]
    assert own == ["cell", *lstm]

"""Dropout inside the loop, weight drop, zoneout, clipped gradients: against the equations.

The oracle is the papers' equations in a loop of its own, given the same masks.
"""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerances import GRADIENTS32, GRADIENTS64, VALUES64

import fusedrnn
from fusedrnn import Regularizers, op, regularizers
from fusedrnn.backends import reference
from fusedrnn.call import LayerMasks, Masks, Operands, Spec
from fusedrnn.regularizers import Noise

T, B, I, H = 6, 3, 4, 5
each_cell = pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
ALL = {"input_dropout": 0.3, "recurrent_dropout": 0.3, "weight_drop": 0.3, "zoneout": 0.2}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def oracle(name, x, states, w_ih, w_hh, b_ih, b_hh, h_mask=None, zoneout=None):
    """One layer and direction. zoneout: t, s -> [B, H] of True where state s is kept, or floats."""
    outputs = []
    for t, x_t in enumerate(x):
        h = states[0] if h_mask is None else states[0] * h_mask
        a, b = F.linear(x_t, w_ih, b_ih), F.linear(h, w_hh, b_hh)
        if name == "LSTM":
            i, f, g, o = (a + b).chunk(4, -1)
            c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
            new = [torch.sigmoid(o) * torch.tanh(c), c]
        elif name == "GRU":
            (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3, -1), b.chunk(3, -1)
            z = torch.sigmoid(a_z + b_z)
            n = torch.tanh(a_n + torch.sigmoid(a_r + b_r) * b_n)
            new = [(1 - z) * n + z * states[0]]  # the path around the gates is not dropped
        else:
            new = [torch.tanh(a + b)]
        if zoneout is not None:
            for s in range(len(new)):
                d = zoneout(t, s).to(x.dtype)
                new[s] = d * states[s] + (1 - d) * new[s]
        states = new
        outputs.append(new[0])
    return torch.stack(outputs), states


def make(name, **kwargs):
    module = getattr(fusedrnn, name)(I, H, dtype=torch.float64, **kwargs)
    S = 2 if name == "LSTM" else 1
    x = torch.randn(T, B, I, dtype=torch.float64)
    hx = tuple(torch.randn(1, B, H, dtype=torch.float64) for _ in range(S))
    return module, x, hx


def run(module, x, hx):
    output, final = module(x, hx if len(hx) > 1 else hx[0])
    return output, final if isinstance(final, tuple) else (final,)


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], **VALUES64)
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one[0], other, **VALUES64)


@each_cell
def test_recurrent_dropout_is_one_mask_on_h_for_all_steps(name):
    module, x, hx = make(name, recurrent_dropout=0.4)
    torch.manual_seed(7)
    found = run(module, x, hx)
    torch.manual_seed(7)
    mask = regularizers.draw_h_mask(Noise(module.regularizers), hx[0])
    assert set(mask.unique().tolist()) == {0.0, 1 / (1 - 0.4)}
    expected = oracle(name, x, [h[0] for h in hx], *module.parameters(), h_mask=mask[0])
    assert_same(found, expected)


@each_cell
def test_zoneout_keeps_units_at_random_in_training(name):
    module, x, hx = make(name, zoneout=(0.5, 0.1) if name == "LSTM" else 0.5)
    torch.manual_seed(7)
    found = run(module, x, hx)
    torch.manual_seed(7)
    kept = regularizers.zoneout_of(Noise(module.regularizers), (T, B), hx, training=True)
    assert kept.shape == (T, B, 1, len(hx), H)
    expected = oracle(
        name, x, [h[0] for h in hx], *module.parameters(), zoneout=lambda t, s: kept[t, :, 0, s]
    )
    assert_same(found, expected)


@each_cell
def test_zoneout_takes_the_expectation_in_evaluation(name):
    rates = (0.5, 0.1)[: 2 if name == "LSTM" else 1]
    module, x, hx = make(name, zoneout=rates)
    module.eval()
    expected = oracle(
        name, x, [h[0] for h in hx], *module.parameters(),
        zoneout=lambda t, s: torch.full((B, H), rates[s], dtype=torch.float64),
    )  # fmt: skip
    found = run(module, x, hx)
    assert_same(found, expected)
    assert torch.equal(found[0], run(module, x, hx)[0])


@each_cell
def test_input_dropout_is_one_mask_for_all_steps_of_each_layer(name):
    module, x, _ = make(name, input_dropout=0.4, num_layers=2, bidirectional=True)
    plain = getattr(fusedrnn, name)(I, H, 2, bidirectional=True, dtype=torch.float64)
    plain.load_state_dict(module.state_dict())
    own = module.regularizers
    first = getattr(fusedrnn, name)(I, H, bidirectional=True, dtype=torch.float64)
    second = getattr(fusedrnn, name)(2 * H, H, bidirectional=True, dtype=torch.float64)
    weights = list(plain.parameters())
    for part, given in ((first, weights[:8]), (second, weights[8:])):
        part.load_state_dict(dict(zip(part.state_dict(), given, strict=True)))
    torch.manual_seed(7)
    found = module(x)[0]
    torch.manual_seed(7)
    below = regularizers.draw_input_mask(Noise(own), x.shape[-1], x, None, False)
    assert below.shape == (1, B, I)
    between = first(x * below)[0]
    above = regularizers.draw_input_mask(Noise(own), between.shape[-1], between, None, False)
    torch.testing.assert_close(found, second(between * above)[0], **VALUES64)


@each_cell
def test_weight_drop_is_one_mask_on_w_hh(name):
    module, x, _ = make(name, weight_drop=0.4, num_layers=2)
    torch.manual_seed(7)
    found = module(x)[0]
    plain = getattr(fusedrnn, name)(I, H, 2, dtype=torch.float64)
    state = module.state_dict()
    torch.manual_seed(7)
    for key in ("weight_hh_l0", "weight_hh_l1"):
        dropped = F.dropout(state[key], 0.4)
        assert (dropped == 0).any()
        state[key] = dropped
    plain.load_state_dict(state)
    torch.testing.assert_close(found, plain(x)[0], **VALUES64)


def test_weight_drop_and_input_dropout_run_on_torchs_operators():
    module, x, _ = make("LSTM", weight_drop=0.4, input_dropout=0.2, num_layers=2)
    assert fusedrnn.explain(module, x).backend == "aten"
    torch.manual_seed(7)
    found = module(x)[0]
    module.backend = "reference"
    torch.manual_seed(7)
    torch.testing.assert_close(found, module(x)[0], **VALUES64)


@pytest.mark.parametrize("p", [0.1, 0.5])
@each_cell
def test_rates(name, p):
    """Each mask drops the share it is told: 5 sigma of a binomial."""
    own = Regularizers(input_dropout=p, recurrent_dropout=p, weight_drop=p, zoneout=p)
    n = 40_000
    x = torch.ones(200, 200, 1)
    sigma = math.sqrt(p * (1 - p) / n)
    state = (torch.zeros(1, 200, 200),)
    for dropped in (
        regularizers.draw_input_mask(Noise(own), 200, torch.ones(1, 200, 200), None, False) == 0,
        regularizers.draw_h_mask(Noise(own), state[0]) == 0,
        ~regularizers.kept_by_dropout(Noise(own), x.shape[:-1], p, x),
        regularizers.zoneout_of(Noise(own), (1, 200), state, training=True),
    ):
        assert dropped.numel() == n
        assert abs(dropped.float().mean().item() - p) < 5 * sigma


@each_cell
def test_nothing_is_dropped_in_evaluation(name):
    module, x, hx = make(name, **{**ALL, "zoneout": 0.0})
    plain = getattr(fusedrnn, name)(I, H, dtype=torch.float64)
    plain.load_state_dict(module.state_dict())
    assert not torch.equal(run(module, x, hx)[0], run(plain, x, hx)[0])
    module.eval()
    plain.eval()
    assert fusedrnn.explain(module, x).backend == "aten"
    assert torch.equal(run(module, x, hx)[0], run(plain, x, hx)[0])


@each_cell
def test_seeds(name):
    module, x, _ = make(name, **ALL, num_layers=2, bidirectional=True)

    def draw(seed):
        torch.manual_seed(seed)
        return module(x)[0]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))

    own = torch.Generator()
    module.regularizers = Regularizers(**ALL, generator=own)
    first = [module(x)[0] for _ in range(2) if own.manual_seed(5)]
    assert torch.equal(*first)
    before = torch.get_rng_state()
    assert not torch.equal(first[0], module(x)[0])
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone


def test_batch_layouts_and_packed_sequences_draw_the_same():
    module, x, _ = make("LSTM", recurrent_dropout=0.3, input_dropout=0.3, bidirectional=True)
    lengths = torch.tensor([6, 4, 1])
    torch.manual_seed(7)
    padded, _ = module(x, lengths=lengths)
    torch.manual_seed(7)
    packed, _ = module(torch.nn.utils.rnn.pack_padded_sequence(x, lengths))
    unpacked, _ = torch.nn.utils.rnn.pad_packed_sequence(packed)
    torch.testing.assert_close(unpacked, padded, **VALUES64)
    module.batch_first = True
    torch.manual_seed(7)
    swapped, _ = module(x.transpose(0, 1), lengths=lengths)
    torch.testing.assert_close(swapped.transpose(0, 1), padded, **VALUES64)


@pytest.mark.parametrize("layout", ["padded", "batch_first", "packed", "unbatched"])
def test_zoneout_in_every_layout(layout):
    module, x, _ = make("GRU", zoneout=0.999, num_layers=2, bidirectional=True)
    if layout == "packed":
        x = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([6, 4, 1]))
    if layout == "unbatched":
        x = x[:, 0]
    module.batch_first = layout == "batch_first"
    output = module(x)[0]
    output = output.data if layout == "packed" else output
    assert (output == 0).float().mean() > 0.8  # almost all units keep h_0 = 0
    module.eval()
    output = module(x)[0]
    output = output.data if layout == "packed" else output
    assert 0 < output.abs().max() < 0.02


@each_cell
def test_backward_sees_the_mask_of_its_forward(name):
    """Through the custom ops, whose backward runs the layer again."""
    module, x, hx = make(name)
    S = len(hx)
    h_mask = regularizers.draw_h_mask(Noise(Regularizers(recurrent_dropout=0.5)), hx[0])
    kept = regularizers.zoneout_of(Noise(Regularizers(zoneout=0.3)), (T, B), hx, training=True)
    masks = Masks(layers=(LayerMasks(h=h_mask, zoneout=kept),))
    spec = Spec(module.mode.lower(), I, H, backend="reference")
    tensors = [t.requires_grad_() for t in (x, *hx)]
    gradients = []
    operands = Operands(x, tuple(tensors[1:]), (), tuple(module.parameters()))
    for function in (op.run, reference.forward):
        output, *_ = function(spec, operands, masks)
        gradients.append(torch.autograd.grad(output.square().sum(), [*tensors]))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, **VALUES64)
    expected, _ = oracle(
        name, x, [h[0] for h in hx], *module.parameters(), h_mask[0],
        lambda t, s: kept[t, :, 0, s],
    )  # fmt: skip
    exact = torch.autograd.grad(expected.square().sum(), tensors)
    assert len(tensors) == 1 + S
    for one, other in zip(gradients[0], exact, strict=True):
        torch.testing.assert_close(one, other, **GRADIENTS64)


@pytest.mark.parametrize("compiled", [False, True])
@each_cell
def test_clipping(name, compiled):
    """dh_t, of the output and the next step together, is cut to [-c, c] in every step."""
    limit = 0.3
    module, x, hx = make(name, clip_gradient=limit)
    plain, _, _ = make(name)
    plain.load_state_dict(module.state_dict())
    call = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    d_output = torch.randn(T, B, H, dtype=torch.float64)
    x.requires_grad_()
    output = call(x)[0]
    assert torch.equal(output, plain(x)[0]) or torch.allclose(output, plain(x)[0], rtol=1e-12)
    (found,) = torch.autograd.grad(output, x, d_output)

    # The recurrence spelled out: from the last step to the first, one step's vjp at a time.
    states = [tuple(torch.zeros_like(h) for h in hx)]
    for t in range(T):
        final = plain(x[t : t + 1].detach(), states[-1] if len(hx) > 1 else states[-1][0])[1]
        states.append(tuple(s.detach() for s in (final if len(hx) > 1 else (final,))))
    carried = [torch.zeros_like(h) for h in hx]
    expected = []
    clipped = 0
    for t in reversed(range(T)):
        carried[0] = carried[0] + d_output[t]
        clipped += (carried[0].abs() > limit).sum().item()
        carried[0] = carried[0].clamp(-limit, limit)
        leaves = [s.requires_grad_() for s in states[t]]
        x_t = x[t : t + 1].detach().requires_grad_()
        final = plain(x_t, tuple(leaves) if len(hx) > 1 else leaves[0])[1]
        final = final if len(hx) > 1 else (final,)
        d_x, *carried = torch.autograd.grad(final, [x_t, *leaves], carried)
        expected.append(d_x[0])
    assert clipped > 20
    torch.testing.assert_close(found, torch.stack(expected[::-1]), **GRADIENTS64)


def test_clipping_bounds_an_exploding_gradient():
    gradients = {}
    for clip in (None, 1.0):
        torch.manual_seed(0)
        module = fusedrnn.RNN(1, 8, nonlinearity="relu", clip_gradient=clip)
        with torch.no_grad():
            module.weight_hh_l0.copy_(2 * torch.eye(8))
            module.bias_ih_l0.fill_(1.0)
        x = torch.ones(60, 1, 1, requires_grad=True)
        (gradients[clip],) = torch.autograd.grad(module(x)[0][-1].sum(), x)
    assert gradients[None].abs().max() > 2.0**50
    assert gradients[1.0].abs().max() <= 8  # 8 units, each dh_t at most 1, |w_ih| < 1


def test_checkpointing_repeats_the_masks():
    module, x, _ = make("LSTM", **ALL)
    x.requires_grad_()
    torch.manual_seed(7)
    expected = torch.autograd.grad(module(x)[0].square().sum(), x)[0]
    torch.manual_seed(7)
    output = torch.utils.checkpoint.checkpoint(lambda x: module(x)[0], x, use_reentrant=False)
    found = torch.autograd.grad(output.square().sum(), x)[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("reentrant", [True, False])
@each_cell
def test_checkpointing_repeats_the_masks_of_a_generator(name, reentrant):
    """Two chunks, each a checkpoint of two calls: the last is run again first."""
    own = torch.Generator()
    module, x, _ = make(name, **ALL, num_layers=2, dropout=0.3, generator=own)
    x.requires_grad_()

    def twice(x):
        return module(x)[0] + 2 * module(x)[0]

    def gradients(run):
        own.manual_seed(5)
        output = run(x) * run(2 * x)
        leaves = [x, *module.parameters()]
        for leaf in leaves:
            leaf.grad = None
        output.square().sum().backward()
        return [output, *(leaf.grad for leaf in leaves)]

    expected = gradients(twice)
    found = gradients(
        lambda x: torch.utils.checkpoint.checkpoint(twice, x, use_reentrant=reentrant)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **GRADIENTS64)
    state = own.get_state()
    gradients(twice)
    assert torch.equal(own.get_state(), state)  # what is run again draws from a copy


def test_a_checkpoint_that_cannot_repeat_says_so():
    module, x, _ = make("GRU", recurrent_dropout=0.5, generator=torch.Generator())
    output = torch.utils.checkpoint.checkpoint(
        lambda x: module(x)[0], x.requires_grad_(), use_reentrant=False, preserve_rng_state=False
    )
    with pytest.raises(RuntimeError, match=r"generator: .*preserve_rng_state=True"):
        output.sum().backward()


@each_cell
def test_a_generator_draws_the_dropout_between_layers_too(name):
    own = torch.Generator()
    module = getattr(fusedrnn, name)(I, H, 2, dropout=0.5, generator=own)
    x = torch.randn(T, B, I)
    before = torch.get_rng_state()
    first, again = (module(x)[0] for _ in range(2) if own.manual_seed(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, module(x)[0])
    assert torch.equal(torch.get_rng_state(), before)
    dropped = ~regularizers.kept_by_dropout(Noise(module.regularizers), (200, 200), 0.5, x)
    assert abs(dropped.float().mean() - 0.5) < 5 * 0.5 / 200  # 5 sigma of a binomial


@pytest.mark.parametrize(
    ("name", "backend"),
    [("LSTM", "inductor"), ("LSTM", "aot_eager"), ("GRU", "aot_eager"), ("RNN", "aot_eager")],
)
def test_a_generator_in_a_compiled_function(name, backend):
    """The same draw and the same gradients, compiled or not, in a checkpoint or not."""
    own = torch.Generator()
    module = getattr(fusedrnn, name)(I, H, 2, **ALL, dropout=0.3, generator=own)
    x = torch.randn(T, B, I)

    def inside(x):
        return torch.utils.checkpoint.checkpoint(lambda x: module(x)[0], x, use_reentrant=False)

    def gradients(run):
        own.manual_seed(4)
        return torch.autograd.grad(run(x).square().sum(), list(module.parameters()))

    expected = gradients(lambda x: module(x)[0])
    for call in (lambda x: module(x)[0], inside):
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend=backend)
        for _ in range(2):
            torch.testing.assert_close(gradients(compiled), expected, **GRADIENTS32)


@each_cell
def test_two_calls_in_one_graph_draw_twice(name):
    """On the same input, where a compiler would take one draw for the other."""
    own = torch.Generator()
    module = getattr(fusedrnn, name)(I, H, recurrent_dropout=0.5, generator=own)
    x = torch.randn(T, B, I)

    def twice(x):
        return module(x)[0], module(x)[0]

    own.manual_seed(4)
    expected = twice(x)
    assert not torch.equal(*expected)
    own.manual_seed(4)
    found = torch.compile(twice, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected, **GRADIENTS32)


def test_a_generator_survives_copies_and_pickles():
    """As a generator of their own, in the state in which it was."""
    module = fusedrnn.GRU(I, H, recurrent_dropout=0.5, generator=torch.Generator())
    x = torch.randn(T, B, I)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.regularizers.generator is not module.regularizers.generator
        own = [m.regularizers.generator.manual_seed(3) for m in (module, other)]
        assert torch.equal(module(x)[0], other(x)[0])
        assert torch.equal(own[0].get_state(), own[1].get_state())
    old = Regularizers.__new__(Regularizers)  # of a pickle from before there were handles
    old.__setstate__({k: v for k, v in vars(module.regularizers).items() if k != "_handle"})
    assert old == module.regularizers
    assert old._handle == module.regularizers._handle > 0


@each_cell
def test_they_compile_in_one_graph(name):
    module = getattr(fusedrnn, name)(I, H, 2, bidirectional=True, **ALL)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(T, B, I)
    torch.manual_seed(3)
    found = compiled(x)[0]
    torch.manual_seed(3)
    torch.testing.assert_close(found, module(x)[0])
    found.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    module.eval()
    torch.testing.assert_close(compiled(x)[0], module(x)[0])


def test_modules_that_use_none_of_it_carry_nothing():
    module = fusedrnn.LSTM(I, H)
    assert module.regularizers is None
    assert "regularizers" not in vars(module)
    assert fusedrnn.LSTM(I, H, recurrent_dropout=0.0).regularizers is None


def test_printing_copying_and_pickling():
    module = fusedrnn.LSTM(I, H, 2, recurrent_dropout=0.25, zoneout=(0.1, 0.05))
    assert repr(module) == "LSTM(4, 5, num_layers=2, recurrent_dropout=0.25, zoneout=(0.1, 0.05))"
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.regularizers == module.regularizers


def test_they_can_be_given_to_a_replaced_module():
    model = torch.nn.Sequential(torch.nn.LSTM(I, H))
    fusedrnn.replace_modules(model)
    model[0].regularizers = Regularizers(recurrent_dropout=0.5)
    x = torch.randn(T, B, I)
    assert not torch.equal(model(x)[0], model(x)[0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"recurrent_dropout": 1.0}, ValueError, r"recurrent_dropout: .* \[0, 1\), got 1.0"),
        ({"input_dropout": -0.1}, ValueError, r"input_dropout: .* \[0, 1\), got -0.1"),
        ({"weight_drop": True}, ValueError, r"weight_drop: .* got True"),
        ({"zoneout": "much"}, ValueError, r"zoneout: .* got 'much'"),
        ({"zoneout": (0.1, 2)}, ValueError, r"zoneout: .* got 2"),
        ({"zoneout": (0.1, 0.1, 0.1)}, ValueError, r"zoneout: expected one probability or 2"),
        ({"clip_gradient": 0}, ValueError, r"clip_gradient: expected a positive number.*got 0"),
        ({"generator": 3}, TypeError, r"generator: expected a torch.Generator, got int"),
        ({"recurent_dropout": 0.1}, TypeError, "recurent_dropout"),
    ],
)
def test_misuse(arguments, error, message):
    with pytest.raises(error, match=message):
        fusedrnn.LSTM(I, H, **arguments)


def test_misuse_of_zoneout_with_a_projection():
    fusedrnn.LSTM(I, H, proj_size=2, zoneout=0.0, clip_gradient=1.0)
    with pytest.raises(ValueError, match="zoneout: expected no projection, got proj_size=2"):
        fusedrnn.LSTM(I, H, proj_size=2, zoneout=0.1)
    module = fusedrnn.LSTM(I, H, proj_size=2)
    module.regularizers = Regularizers(zoneout=0.1)
    with pytest.raises(ValueError, match="zoneout: expected no projection, got proj_size=2"):
        module(torch.randn(T, B, I))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numbers_of_numpy(dtype):
    p = dtype(0.25)
    own = Regularizers(p, p, p, zoneout=(p, p), clip_gradient=p)
    assert own == Regularizers(0.25, 0.25, 0.25, zoneout=(0.25, 0.25), clip_gradient=0.25)
    assert str(own).count("0.25") == 6
    assert "np." not in str(own)
    module = fusedrnn.LSTM(I, H, zoneout=p, recurrent_dropout=p, clip_gradient=p)
    torch.compile(module, backend="eager")(torch.randn(T, B, I))[0].sum().backward()


def test_recurrent_dropout_with_a_projection_drops_projected_units():
    module = fusedrnn.LSTM(I, H, proj_size=2, recurrent_dropout=0.5)
    assert module(torch.randn(T, B, I))[0].shape == (T, B, 2)


def test_explained_and_refused_where_missing():
    x = torch.randn(T, B, I)
    module = fusedrnn.LSTM(I, H, zoneout=0.1, recurrent_dropout=0.1, clip_gradient=1.0)
    text = str(fusedrnn.explain(module, x))
    for words in ("recurrent dropout", "zoneout", "gradient clipping inside the loop"):
        assert words in text
    module.backend = "aten"
    with pytest.raises(RuntimeError, match=r"'aten' was asked for .* recurrent dropout and zon"):
        module(x)


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_all_of_it_may_be_dropped(backend):
    module = fusedrnn.GRU(I, H, 2, dropout=1.0, backend=backend)
    torchs = torch.nn.GRU(I, H, 2, dropout=1.0)
    torchs.load_state_dict(module.state_dict())
    x = torch.randn(T, B, I)
    torch.testing.assert_close(module(x)[0], torchs(x)[0])

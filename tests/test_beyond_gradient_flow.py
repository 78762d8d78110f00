"""Sensitivities against autograd's Jacobians, norms of gradients against finite differences."""

import copy

import pytest
import torch
from tolerances import GRADIENTS64, assert_exact
from torch.nn.utils import prune

import fusedrnn
from fusedrnn.gradient_flow import (
    plot_sensitivity,
    plot_state_gradients,
    sensitivity,
    state_gradients,
)

T, B, I, H = 5, 2, 3, 4
each_cell = pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
LAYOUTS = [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}]


def test_sensitivity_is_not_clipped():
    plain = fusedrnn.RNN(I, H, nonlinearity="relu", dtype=torch.float64)
    with torch.no_grad():
        plain.weight_hh_l0.mul_(4)
    clipping = fusedrnn.RNN(I, H, nonlinearity="relu", dtype=torch.float64, clip_gradient=1e-3)
    clipping.load_state_dict(plain.state_dict())
    x = torch.randn(T, B, I, dtype=torch.float64)
    expected = sensitivity(plain, x)
    assert expected.max() > 1
    assert_exact(sensitivity(clipping, x), expected, "sensitivity")
    assert clipping.regularizers.clip_gradient == 1e-3


def test_state_gradients_with_a_weight_that_a_hook_computes():
    model = prune.identity(fusedrnn.GRU(I, H, dtype=torch.float64), "weight_hh_l0")
    with torch.no_grad():
        model.weight_hh_l0_orig.mul_(3)  # what it was pruned from; the weight itself is stale
    x = torch.randn(T, B, I, dtype=torch.float64)
    found = state_gradients(model, x, lambda output: output.square().sum())
    plain = prune.remove(model, "weight_hh_l0")
    expected = state_gradients(plain, x, lambda output: output.square().sum())
    assert_exact(found.norms["h"], expected.norms["h"], "norms")


def test_a_hook_costs_no_noise():
    """The same seed draws the same masks, whether a hook computes the weights or not."""
    module = fusedrnn.GRU(I, H, zoneout=0.5, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    found = []
    for model in (module, prune.identity(copy.deepcopy(module), "weight_hh_l0")):
        torch.manual_seed(5)
        found.append(state_gradients(model, x, lambda output: output.sum()).loss)
    assert found[0] == found[1]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["plain", "2x2", "batch_first"])
@each_cell
def test_sensitivity_is_the_norm_of_the_jacobian(name, layout):
    module = getattr(fusedrnn, name)(I, H, dtype=torch.float64, **layout)
    x = torch.randn(T, B, I, dtype=torch.float64)
    given = x.transpose(0, 1).contiguous() if module.batch_first else x
    jacobian = torch.autograd.functional.jacobian(lambda x: module(x)[0], given)
    if module.batch_first:
        jacobian = jacobian.transpose(0, 1).transpose(3, 4)
    exact = jacobian.square().sum((2, 5)).sqrt()  # [T, B, T, B]
    exact = exact.diagonal(dim1=1, dim2=3)
    found = sensitivity(module, given, chunk=7)
    assert found.shape == (T, T, B)
    torch.testing.assert_close(found, exact, **GRADIENTS64)
    torch.testing.assert_close(sensitivity(module, given, at=[-1, 1]), exact[[-1, 1]])
    row = given[1] if module.batch_first else given[:, 1]
    torch.testing.assert_close(sensitivity(module, row), exact[:, :, 1])


def test_sensitivity_sees_no_future_and_stops_at_resets_and_lengths():
    module = fusedrnn.LSTM(I, H)
    x = torch.randn(T, B, I)
    assert not sensitivity(module, x).permute(2, 0, 1).triu(1).any()
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3, 0] = True
    found = sensitivity(module, x, reset=reset, lengths=torch.tensor([5, 2]))
    assert not found[3:, :3, 0].any()
    assert found[3:, 3, 0].all()
    assert not found[2:, :, 1].any()
    assert found[1, :2, 1].all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["plain", "2x2", "batch_first"])
@each_cell
def test_state_gradients_are_those_of_a_disturbed_state(name, layout):
    """Oracle: cut the sequence after step t, disturb the state there, and go on."""
    module = getattr(fusedrnn, name)(I, H, dtype=torch.float64, **layout)
    x = torch.randn(T, B, I, dtype=torch.float64)
    given = x.transpose(0, 1).contiguous() if module.batch_first else x

    def loss(output):
        output = output.transpose(0, 1) if module.batch_first else output
        return (output[-1] ** 3).sum()  # nothing of the loss sits between

    value, norms = state_gradients(module, given, loss)
    assert value == pytest.approx(loss(module(given)[0]).item(), rel=1e-12)
    D = 2 if module.bidirectional else 1
    states = ["h", "c"] if name == "LSTM" else ["h"]
    assert {n: tuple(v.shape) for n, v in norms.items()} == {
        n: (module.num_layers, D, T, B) for n in states
    }
    if module.num_layers > 1:
        # Of two layers and directions, the last layer's last step is known: 3 h^2, from the output.
        output = module(given)[0]
        exact = (3 * output[-1] ** 2).unflatten(-1, (2, H))[:, 0].norm(dim=-1)
        torch.testing.assert_close(norms["h"][1, 0, -1], exact)
        return
    for t in range(1, T):
        head = given[:, :t] if module.batch_first else given[:t]
        tail = given[:, t:] if module.batch_first else given[t:]
        final = module(head)[1]
        final = [s.detach().requires_grad_() for s in (final if name == "LSTM" else (final,))]
        output = module(tail, tuple(final) if name == "LSTM" else final[0])[0]
        gradients = torch.autograd.grad(loss(output), final)
        # d loss / d h_{t-1} of an LSTM holds no path through c_{t-1}, and this neither.
        torch.testing.assert_close(
            norms["h"][0, 0, t - 1], gradients[0][0].norm(dim=-1), **GRADIENTS64
        )


def test_state_gradients_in_every_layer_by_their_sum_over_paths():
    """The recorded nodes carry the whole gradient: the loss moves with them as told."""
    module = fusedrnn.GRU(I, H, 2, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    _, norms = state_gradients(module, x, lambda output: output.square().sum())
    lower = fusedrnn.GRU(I, H, dtype=torch.float64)
    upper = fusedrnn.GRU(H, H, dtype=torch.float64)
    values = list(module.parameters())
    for part, own in ((lower, values[:4]), (upper, values[4:])):
        part.load_state_dict(dict(zip(part.state_dict(), own, strict=True)))
    # Step t of the lower layer alone: its h goes on to the next step, and up.
    h, hs = None, []
    for x_t in x:
        _, h = lower(x_t[None], h)
        hs.append(h)
    output = upper(torch.cat(hs))[0]
    exact = torch.autograd.grad(output.square().sum(), hs)
    torch.testing.assert_close(norms["h"][0, 0], torch.cat(exact).norm(dim=-1), **GRADIENTS64)


def test_state_gradients_with_lengths_resets_and_clipping():
    module = fusedrnn.RNN(I, H, clip_gradient=0.01)
    x = torch.randn(T, B, I)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3, 0] = True
    _, norms = state_gradients(
        module, x, lambda o: o[-1, 0].sum() + o[1, 1].sum(), lengths=torch.tensor([5, 2]),
        reset=reset,
    )  # fmt: skip
    h = norms["h"][0, 0]
    assert not h[:3, 0].any()
    assert h[3:, 0].all()
    assert h[:2, 1].all()
    assert not h[2:, 1].any()
    assert h.max() <= 0.01 * H**0.5 + 1e-7
    assert state_gradients(module, x[:, 0], lambda o: o.sum()).norms["h"].shape == (1, 1, T)


def identity_rnn(size):
    """Le, Jaitly & Hinton 2015: relu, W_hh = 1, no bias."""
    module = fusedrnn.RNN(I, size, nonlinearity="relu", bias=False, dtype=torch.float64)
    with torch.no_grad():
        module.weight_hh_l0.copy_(torch.eye(size))
        module.weight_ih_l0.abs_()
    return module


def test_the_lecture():
    """A tanh RNN forgets exponentially, an identity-initialised relu RNN does not."""
    torch.manual_seed(0)  # how much is forgotten depends on the weights
    x = torch.rand(40, 1, I, dtype=torch.float64)
    iden = sensitivity(identity_rnn(8), x, at=[-1])[0, :, 0]
    torch.testing.assert_close(iden, iden[-1].expand(40))  # constant: nothing is lost
    tanh = fusedrnn.RNN(I, 8, dtype=torch.float64)
    vanishing = sensitivity(tanh, x, at=[-1])[0, :, 0]
    assert vanishing[0] < 1e-6 * vanishing[-1]
    with torch.no_grad():
        lstm = fusedrnn.LSTM(I, 8, dtype=torch.float64)
        before = sensitivity(lstm, x, at=[-1])[0, :, 0]
        lstm.bias_hh_l0[8:16] += 5.0  # forget gates open
        after = sensitivity(lstm, x, at=[-1])[0, :, 0]
    assert after[0] / after[-1] > 1e4 * before[0] / before[-1]


@each_cell
def test_plots(name):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    module = getattr(fusedrnn, name)(I, H, 2, bidirectional=True)
    x = torch.randn(T, B, I)
    axes = plot_sensitivity(sensitivity(module, x), title=name)
    assert axes.images[0].get_array().shape == (T, T)
    axes = plot_state_gradients(state_gradients(module, x, torch.sum).norms["h"], label=name)
    assert len(axes.lines) == 4
    assert axes.lines[3].get_label() == f"{name} layer 1 reverse"


@pytest.mark.parametrize("function", [sensitivity, lambda m, x: state_gradients(m, x, torch.sum)])
def test_misuse(function):
    x = torch.randn(T, B, I)
    with pytest.raises(TypeError, match="module: expected an LSTM, GRU, RNN or Recurrent of"):
        function(torch.nn.GRU(I, H), x)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 2]))
    with pytest.raises(TypeError, match="input: expected a padded tensor, got PackedSequence"):
        function(fusedrnn.GRU(I, H), packed)
    with pytest.raises(RuntimeError, match="input_size=3"):
        function(fusedrnn.GRU(I, H), x[..., :2])


def test_misuse_of_steps_and_losses():
    module, x = fusedrnn.GRU(I, H), torch.randn(T, B, I)
    with pytest.raises(ValueError, match=r"at: expected steps from -5 to 4, got \[5\]"):
        sensitivity(module, x, at=[5])
    with pytest.raises(TypeError, match=r"loss: expected a function to a scalar.*\(5, 2, 4\)"):
        state_gradients(module, x, lambda output: output)

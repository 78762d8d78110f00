"""What a program does with torch.nn's modules besides calling them."""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from tolerances import assert_same
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn

KINDS = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_class = pytest.mark.parametrize("kind", KINDS + CELLS)


def pair(kind, *args, **kwargs):
    """torch's module and ours with the same parameters."""
    torchs = getattr(nn, kind)(*args, **kwargs)
    ours = getattr(fusedrnn, kind)(*args, **kwargs)
    ours.load_state_dict(torchs.state_dict())
    return torchs, ours


def first(outputs):
    while isinstance(outputs, tuple):
        outputs = outputs[0]
    return outputs


def sample(kind):
    return torch.randn(4, 3) if kind in CELLS else torch.randn(5, 4, 3)


# Construction

POSITIONAL = {
    "LSTM": (3, 5, 2, False, True, 0.25, True, 2, "cpu", torch.float64),
    "GRU": (3, 5, 2, False, True, 0.25, True, 0, "cpu", torch.float64),
    "RNN": (3, 5, 2, "relu", False, True, 0.25, True, 0, "cpu", torch.float64),
    "LSTMCell": (3, 5, False, "cpu", torch.float64),
    "GRUCell": (3, 5, False, "cpu", torch.float64),
    "RNNCell": (3, 5, False, "relu", "cpu", torch.float64),
}


@every_class
def test_positional_arguments(kind):
    for count in range(2, len(POSITIONAL[kind]) + 1):
        args = POSITIONAL[kind][:count]
        torchs, ours = pair(kind, *args)
        assert repr(ours) == repr(torchs)
        names = ("input_size", "hidden_size", "num_layers", "nonlinearity", "bias", "batch_first")
        for name in (*names, "dropout", "bidirectional", "proj_size", "mode"):
            assert hasattr(ours, name) == hasattr(torchs, name), name
            assert getattr(ours, name, None) == getattr(torchs, name, None), name
        assert [p.dtype for p in ours.parameters()] == [p.dtype for p in torchs.parameters()]


@every_class
def test_state_dict_both_ways(kind):
    torchs, ours = pair(kind, 3, 5)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    fresh = getattr(nn, kind)(3, 5)
    fresh.load_state_dict(ours.state_dict())
    input = sample(kind)
    assert_same(first(fresh(input)), first(ours(input)), "after a round trip")


@pytest.mark.parametrize("kind", ["GRU", "RNN"])
def test_only_lstm_has_projections(kind):
    with pytest.raises(ValueError, match="proj_size: expected 0, since only lstm"):
        getattr(fusedrnn, kind)(3, 5, proj_size=2)
    with pytest.raises(ValueError, match="proj_size: expected 0, since only lstm"):
        getattr(fusedrnn, kind)(*POSITIONAL[kind][:-3], 2)


@every_kind
def test_bidirectional_is_a_bool(kind):
    for wrong in (2, 1, None):
        with pytest.raises(TypeError, match=f"bidirectional should be of type bool, got: {wrong}"):
            getattr(fusedrnn, kind)(3, 5, bidirectional=wrong)


@every_kind
def test_dropout_in_one_layer_warns_as_torch(kind):
    for module in (nn, fusedrnn):
        with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
            getattr(module, kind)(3, 5, dropout=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            getattr(module, kind)(3, 5, 2, dropout=0.5)


@every_class
def test_own_keywords_are_checked(kind):
    module = getattr(fusedrnn, kind)(3, 5, backend="reference")
    assert module.backend == "reference"
    with pytest.raises(ValueError, match=r"backend must be one of .*'triton'.* got 'cuda'"):
        getattr(fusedrnn, kind)(3, 5, backend="cuda")
    if kind in KINDS:
        assert getattr(fusedrnn, kind)(3, 5, save="states").save == "states"
        with pytest.raises(ValueError, match=r"save must be one of .* got 'all'"):
            getattr(fusedrnn, kind)(3, 5, save="all")


@every_class
def test_skip_init_draws_nothing(kind):
    before = torch.get_rng_state()
    module = nn.utils.skip_init(getattr(fusedrnn, kind), 3, 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert [n for n, _ in module.named_parameters()] == [
        n for n, _ in getattr(nn, kind)(3, 5).named_parameters()
    ]


FORGET = slice(5, 10)  # the forget gate's part of a bias, with 5 units


def forget_biases(module):
    return {n: p[FORGET].detach() for n, p in module.named_parameters() if n.startswith("bias_ih")}


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "proj_size": 2}])
def test_forget_bias_starts_b_ih_and_nothing_else(options):
    torch.manual_seed(3)
    plain = nn.LSTM(3, 5, **options)
    torch.manual_seed(3)
    ours = fusedrnn.LSTM(3, 5, **options, forget_bias=1)
    assert "forget_bias=1.0" in repr(ours)
    assert list(ours.state_dict()) == list(plain.state_dict())
    expected = {n: p.clone() for n, p in plain.state_dict().items()}
    for name in expected:
        if name.startswith("bias_ih"):
            expected[name][FORGET] = 1
    for name, value in ours.state_dict().items():
        assert torch.equal(value, expected[name]), name
    plain.load_state_dict(ours.state_dict())
    input = sample("LSTM")
    assert_same(first(ours(input)), first(plain(input)), "in torch's module")


@pytest.mark.parametrize("how", ["itself", "copy", "pickle", "skip_init", "to_empty"])
def test_forget_bias_stays_for_reset_parameters(how):
    module = fusedrnn.LSTM(3, 5, 2, forget_bias=-2.5)
    if how == "copy":
        module = copy.deepcopy(module)
    elif how == "pickle":
        module = pickle.loads(pickle.dumps(module))
    elif how == "skip_init":
        module = nn.utils.skip_init(fusedrnn.LSTM, 3, 5, 2, forget_bias=-2.5)
    elif how == "to_empty":
        module = module.to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    module.reset_parameters()
    assert module.forget_bias == -2.5
    assert len(forget_biases(module)) == 2
    for value in forget_biases(module).values():
        assert torch.equal(value, torch.full((5,), -2.5))
    assert all(p.any() for p in module.parameters())


def test_without_forget_bias_all_is_torchs():
    for module in (fusedrnn.LSTM(3, 5), fusedrnn.LSTM(3, 5, bias=False)):
        assert module.forget_bias is None
        assert "forget" not in repr(module)
    model = nn.Sequential(nn.LSTM(3, 5))
    fusedrnn.replace_modules(model)
    model[0].reset_parameters()
    assert all(v.abs().max() <= 1 / 5**0.5 for v in forget_biases(model[0]).values())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"forget_bias": "1"}, TypeError, "forget_bias: expected a number or None, got str"),
        ({"forget_bias": True}, TypeError, "forget_bias: expected a number or None, got bool"),
        ({"forget_bias": float("nan")}, ValueError, "forget_bias: .* finite number, got nan"),
        (
            {"forget_bias": 1, "bias": False},
            ValueError,
            "forget_bias: expected bias=True .*bias=False",
        ),
    ],
)
def test_a_wrong_forget_bias(options, error, message):
    with pytest.raises(error, match=message):
        fusedrnn.LSTM(3, 5, **options)


@every_class
def test_meta_then_to_empty(kind):
    torchs, _ = pair(kind, 3, 5)
    module = getattr(fusedrnn, kind)(3, 5, device="meta").to_empty(device="cpu")
    module.load_state_dict(torchs.state_dict())
    input = sample(kind)
    assert_same(first(module(input)), first(torchs(input)), "after to_empty")


@every_class
def test_documentation_is_there(kind):
    """Third parties read nn.LSTM.__doc__, and some add to it."""
    text = getattr(fusedrnn, kind).__doc__
    for word in ("Args:", "Source:", "input_size", "hidden_size", kind.removesuffix("Cell")):
        assert word in text


# Old and foreign pickles


def test_a_pickle_of_torchs_state_loads():
    """__setstate__ takes what old versions of torch wrote: no proj_size, no names."""
    torchs, ours = pair("LSTM", 3, 5, num_layers=2, bidirectional=True)
    state = copy.deepcopy(torchs.__dict__)
    del state["proj_size"]
    state["all_weights"] = state.pop("_all_weights")
    state["_all_weights"] = [[]]
    state["_all_weights"] = state["all_weights"]
    state.pop("_flat_weight_refs")
    old = fusedrnn.LSTM.__new__(fusedrnn.LSTM)
    old.__setstate__(state)
    assert old.proj_size == 0
    assert old.backend is None
    input = sample("LSTM")
    assert_same(first(old(input)), first(ours(input)), "old pickle")


@every_class
def test_pickled_by_an_earlier_version(kind):
    """A module whose __dict__ lacks what a later version added runs with the defaults."""
    _, ours = pair(kind, 3, 5)
    state = {k: v for k, v in ours.__dict__.items() if k in getattr(nn, kind)(3, 5).__dict__}
    old = ours.__class__.__new__(ours.__class__)
    old.__setstate__(copy.deepcopy(state))
    input = sample(kind)
    assert_same(first(old(input)), first(ours(input)), "stripped")


@every_class
def test_a_model_saved_whole(kind):
    class_ = getattr(fusedrnn, kind)
    model = nn.Sequential(class_(3, 5))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert type(loaded[0]) is class_
    input = sample(kind)
    assert_same(first(loaded(input)), first(model(input)), "loaded")


# Parameters that are exchanged, tied, computed


@every_kind
def test_all_weights_and_flatten_parameters(kind):
    torchs, ours = pair(kind, 3, 5, num_layers=2, bidirectional=True, bias=False)
    assert ours.flatten_parameters() is None
    for group, other in zip(ours.all_weights, torchs.all_weights, strict=True):
        for a, b in zip(group, other, strict=True):
            assert_same(a.detach(), b.detach(), "all_weights")
    assert ours.all_weights[0][0] is ours.weight_ih_l0


@every_kind
def test_reassigned_parameters_are_used(kind):
    torchs, ours = pair(kind, 3, 5)
    input = sample(kind)
    for change in ("assign", "data", "inplace"):
        for module in (torchs, ours):
            weight = module.weight_hh_l0
            if change == "assign":
                module.weight_hh_l0 = nn.Parameter(weight.detach() * 2)
            elif change == "data":
                weight.data = weight.data * 0.5
            else:
                with torch.no_grad():
                    weight.mul_(1.5)
        assert_same(ours(input)[0], torchs(input)[0], change)


@every_kind
def test_shared_parameters_receive_both_gradients(kind):
    torchs, ours = pair(kind, 5, 5, num_layers=2)
    input = torch.randn(4, 2, 5)
    gradients = []
    for module in (torchs, ours):
        module.weight_hh_l1 = module.weight_hh_l0
        module(input)[0].square().sum().backward()
        assert len(list(module.parameters())) == 7
        gradients.append(module.weight_hh_l0.grad)
    assert_same(gradients[1], gradients[0], "tied")


@every_class
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_functional_call(kind, backend):
    torchs, ours = pair(kind, 3, 5)
    ours.backend = backend
    input = sample(kind)
    values = {n: torch.randn_like(p).requires_grad_() for n, p in ours.named_parameters()}
    found = first(torch.func.functional_call(ours, values, (input,)))
    expected = first(torch.func.functional_call(torchs, values, (input,)))
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found.sum(), values.values()),
        torch.autograd.grad(expected.sum(), values.values()),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


WEIGHTS = ("weight_ih_l0", "weight_hh_l0", "weight_hh_l1_reverse", "weight_hr_l0")


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "parametrize", "old weight_norm"])
def test_parametrized_weights(weight, how):
    options = {"num_layers": 2, "bidirectional": True, "proj_size": 2}
    torchs, ours = pair("LSTM", 3, 5, **options)

    class Doubled(nn.Module):
        def forward(self, value):
            return 2 * value

    for module in (torchs, ours):
        torch.manual_seed(1)
        if how == "weight_norm":
            parametrizations.weight_norm(module, weight)
        elif how == "spectral_norm":
            parametrizations.spectral_norm(module, weight)
        elif how == "parametrize":
            parametrize.register_parametrization(module, weight, Doubled())
        else:
            with pytest.warns(FutureWarning):
                nn.utils.weight_norm(module, weight)
    input = sample("LSTM")
    for _ in range(2):  # the second call must see the parameters that the first step changed
        gradients = []
        outputs = []
        for module in (torchs, ours):
            module.zero_grad()
            # spectral_norm refines its estimate whenever the weight is read, and torch reads it
            # more often than once a call.
            with parametrize.cached():
                output, (h_n, c_n) = module(input)
            (output.square().sum() + h_n.sum() + c_n.sum()).backward()
            outputs.append(output)
            gradients.append({n: p.grad for n, p in module.named_parameters()})
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter -= 0.1 * parameter.grad
        # Not bit for bit: where a computed weight lies in memory moves its last digit.
        torch.testing.assert_close(outputs[1], outputs[0])
        torch.testing.assert_close(gradients[1], gradients[0])


@every_class
def test_moving_and_casting(kind):
    _, ours = pair(kind, 3, 5)
    ours.double()
    assert first(ours(sample(kind).double())).dtype == torch.float64
    ours.to("meta")
    assert first(ours(sample(kind).double().to("meta"))).device.type == "meta"
    ours.requires_grad_(False)
    assert not any(p.requires_grad for p in ours.parameters())


# Hooks


@every_class
def test_hooks(kind):
    _, ours = pair(kind, 3, 5)
    seen = []
    ours.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    ours.register_forward_hook(lambda m, args, output: seen.append("post"))
    ours.register_full_backward_pre_hook(lambda m, g: seen.append("backward pre"))
    ours.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    weight = next(ours.parameters())
    weight.register_hook(lambda grad: seen.append("weight") or 2 * grad)
    input = sample(kind).requires_grad_()
    first(ours(input)).sum().backward()
    assert seen[:3] == ["pre", "post", "backward pre"]
    assert sorted(seen[3:]) == ["backward", "weight"]
    doubled = weight.grad.clone()
    plain = copy.deepcopy(getattr(fusedrnn, kind)(3, 5))
    plain.load_state_dict(ours.state_dict())
    first(plain(input)).sum().backward()
    torch.testing.assert_close(doubled, 2 * next(plain.parameters()).grad)


# Sequences


@every_kind
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_no_rows_and_one_step(kind, backend, batch_first):
    torchs, ours = pair(kind, 3, 5, bidirectional=True, batch_first=batch_first)
    ours.backend = backend
    for T, B in ((1, 1), (1, 4), (4, 1), (4, 0), (1, 0)):
        input = torch.randn(*((B, T) if batch_first else (T, B)), 3, requires_grad=True)
        expected, found = torchs(input), ours(input)
        torch.testing.assert_close(found, expected)
        results = [
            torch.autograd.grad(
                first(out).sum() + first(out[1]).sum(), [input, *module.parameters()]
            )
            for out, module in ((found, ours), (expected, torchs))
        ]
        torch.testing.assert_close(results[0], results[1])


@every_kind
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_steps_is_an_error(kind, backend):
    ours = getattr(fusedrnn, kind)(3, 5, backend=backend)
    with pytest.raises(RuntimeError, match=r"expected at least one time step, got .*\(0, 2, 3\)"):
        ours(torch.randn(0, 2, 3))
    with pytest.raises(RuntimeError, match=r"expected at least one time step, got .*\(0, 3\)"):
        ours(torch.randn(0, 3))


@every_kind
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_final_states_are_in_the_callers_order(kind, backend):
    """h_n of an unsorted PackedSequence, row by row against each sequence alone."""
    ours = getattr(fusedrnn, kind)(3, 5, num_layers=2, bidirectional=True, backend=backend)
    ours = ours.double()
    padded = torch.randn(6, 4, 3).double()
    lengths = torch.tensor([2, 6, 1, 4])
    packed = pack_padded_sequence(padded, lengths, enforce_sorted=False)
    output, final = ours(packed)
    assert isinstance(output, PackedSequence)
    for b, length in enumerate(lengths):
        _, alone = ours(padded[:length, b : b + 1])
        torch.testing.assert_close(first(final)[:, b : b + 1], first(alone))
        if kind == "LSTM":
            torch.testing.assert_close(final[1][:, b : b + 1], alone[1])


@every_kind
@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_no_row_has_a_step(kind, backend):
    """All lengths 0: outputs are zeros, states stay, and backward goes through."""
    ours = getattr(fusedrnn, kind)(3, 5, num_layers=2, bidirectional=True, backend=backend)
    input = torch.randn(6, 4, 3, requires_grad=True)
    h_0 = torch.randn(4, 4, 5, requires_grad=True)
    hx = (h_0, torch.randn(4, 4, 5)) if kind == "LSTM" else h_0
    output, final = ours(input, hx, lengths=torch.zeros(4, dtype=torch.int64))
    assert torch.equal(output, torch.zeros(6, 4, 10))
    assert torch.equal(first(final), h_0)
    d_input, d_h_0 = torch.autograd.grad(output.sum() + first(final).sum(), [input, h_0])
    assert torch.equal(d_input, torch.zeros_like(input))
    assert torch.equal(d_h_0, torch.ones_like(h_0))


@every_kind
def test_lengths_and_reset_are_checked(kind):
    ours = getattr(fusedrnn, kind)(3, 5)
    input = torch.randn(6, 4, 3)
    cases = [
        ({"lengths": ["1"]}, TypeError, "lengths: expected 4 integers .* got list"),
        ({"lengths": torch.ones(4)}, TypeError, "lengths: expected integers .*float32"),
        ({"lengths": torch.ones(3, dtype=int)}, RuntimeError, r"lengths: .* \(4,\), got \(3,\)"),
        (
            {"reset": torch.zeros(6, 4)},
            TypeError,
            r"reset: expected a bool tensor \(6, 4\), .*float32",
        ),
        ({"reset": torch.zeros(4, 6).bool()}, RuntimeError, r"reset: .* \(6, 4\), got \(4, 6\)"),
    ]
    for options, kind_of_error, message in cases:
        with pytest.raises(kind_of_error, match=message):
            ours(input, **options)
    packed = pack_padded_sequence(input, [6, 5, 4, 3])
    with pytest.raises(ValueError, match="lengths: a PackedSequence has its own"):
        ours(packed, lengths=torch.ones(4, dtype=int))


@every_kind
def test_another_dtype_is_refused_in_torchs_words(kind):
    """In those of torch 2.13; torch 2.10 has others."""
    words = (
        "RNN input dtype (torch.float64) does not match weight dtype (torch.float32). "
        "Convert input: input.to(torch.float32), or convert model: model.to(torch.float64)"
    )
    torchs, ours = pair(kind, 3, 5)
    for module in (torchs, ours) if torch.__version__ >= "2.13" else (ours,):
        with pytest.raises(ValueError) as refusal:
            module(sample(kind).double())
        assert words in str(refusal.value)


# Other ways to run a module


@every_class
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace(kind):
    _, ours = pair(kind, 3, 5)
    input = sample(kind)
    traced = torch.jit.trace(ours, (input,))
    other = sample(kind)
    torch.testing.assert_close(traced(other), ours(other))


class Model(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(5, 2)

    def forward(self, input: torch.Tensor):
        return self.head(self.rnn(input)[0])


@every_kind
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script(kind):
    torchs, ours = pair(kind, 3, 5)
    input = sample(kind)
    model = Model(ours)
    nested = torch.jit.script(model)  # alone, torch's own classes cannot be scripted either
    torch.testing.assert_close(nested(input), model(input))
    torch.testing.assert_close(nested.rnn.forward__0(input), torchs(input))
    with torch.no_grad():
        ours.weight_hh_l0.zero_()
    torch.testing.assert_close(nested(input), model(input))


@every_kind
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script_leaves_the_model_as_it_was(kind):
    ours = getattr(fusedrnn, kind)(3, 5, backend="reference", save="states", clip_gradient=1.0)
    model = nn.ModuleDict({"inner": Model(ours), "cell": getattr(fusedrnn, f"{kind}Cell")(3, 5)})
    cell, own = model["cell"], ours.regularizers
    torch.jit.script(model.eval())
    assert model["inner"].rnn is ours
    assert model["cell"] is cell
    assert type(ours) is getattr(fusedrnn, kind)
    assert type(cell) is getattr(fusedrnn, f"{kind}Cell")
    assert (ours.backend, ours.save, ours.regularizers) == ("reference", "states", own)
    input = sample(kind)
    ours(input, lengths=torch.tensor([5, 2, 0, 3]))
    ours.step(input[0])
    copy.deepcopy(model)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *itertools.product(
            KINDS, [{}, dict(bidirectional=True, batch_first=True, bias=False), dict(num_layers=2)]
        ),
        ("LSTM", dict(proj_size=2)),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script_of_every_input(kind, options):
    torchs, ours = pair(kind, 3, 5, **options)
    theirs, scripted = (torch.jit.script(Model(m)).rnn for m in (torchs, ours))
    _, hx = torchs(torch.randn(5, 5, 3))
    hx = tuple(map(torch.randn_like, hx)) if kind == "LSTM" else torch.randn_like(hx)
    row = tuple(h[:, 0] for h in hx) if kind == "LSTM" else hx[:, 0]
    input = torch.randn(5, 5, 3)
    packed = pack_padded_sequence(input, torch.tensor([2, 5, 1, 4, 3]), enforce_sorted=False)
    for x, state in ((input, hx), (input[0], row)):
        for args in ((x,), (x, state)):
            torch.testing.assert_close(scripted.forward__0(*args), theirs.forward__0(*args))
    for args in ((packed,), (packed, hx)):
        torch.testing.assert_close(scripted.forward__1(*args), theirs.forward__1(*args))
    for bad in (torch.randn(5, 5, 4), torch.randn(5)):
        for module in (scripted, theirs):
            with pytest.raises(torch.jit.Error, match="input"):
                module.forward__0(bad)
    for module in (scripted, theirs):
        with pytest.raises(torch.jit.Error, match="Expected hidden"):
            module.forward__0(input[:, :3] if not options.get("batch_first") else input[:3], hx)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file).forward__0(input), scripted.forward__0(input))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script_of_relu():
    ours = fusedrnn.RNN(3, 5, nonlinearity="relu")
    input = sample("RNN")
    packed = pack_padded_sequence(input, torch.tensor([5, 2, 1, 3]), enforce_sorted=False)
    scripted = torch.jit.script(Model(ours)).rnn
    torch.testing.assert_close(scripted.forward__0(input), ours(input))
    torch.testing.assert_close(scripted.forward__1(packed), ours(packed))


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script_of_a_cell(kind):
    torchs, ours = pair(kind, 3, 5)
    input = sample(kind)
    scripted = torch.jit.script(nn.Sequential(ours))
    for x in (input, input[0]):
        torch.testing.assert_close(scripted(x), torchs(x))
    assert not hasattr(getattr(nn, kind).forward, "_torchscript_modifier")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script_refuses_what_torch_lacks():
    class Same(fusedrnn.LSTM):
        pass

    input = sample("LSTM")
    model = Model(Same(3, 5))
    torch.testing.assert_close(torch.jit.script(model)(input), model(input))

    class Own(fusedrnn.LSTM):
        def forward(self, input, hx=None):
            return super().forward(2 * input, hx)

    with pytest.raises(TypeError, match=r"Own: torch.jit.script .* cannot stand in for a subclass"):
        torch.jit.script(nn.Sequential(Own(3, 5)))
    Own.__name__ = "LSTM"  # the name is not the class
    with pytest.raises(TypeError, match=r"LSTM: .* cannot stand in for a subclass"):
        torch.jit.script(nn.Sequential(Own(3, 5)))

    parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    with pytest.raises(TypeError, match=r"stand in for a parametrized module: remove"):
        torch.jit.script(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script_of_regularizers_that_are_off():
    dropped = dict(input_dropout=0.2, recurrent_dropout=0.2, weight_drop=0.5, clip_gradient=1.0)
    model, input = Model(fusedrnn.LSTM(3, 5, **dropped)), sample("LSTM")
    with pytest.raises(TypeError, match=r"recurrent_dropout=0.2.*set regularizers = None to drop"):
        torch.jit.script(model)
    scripted = torch.jit.script(model.eval())
    torch.testing.assert_close(scripted(input), model(input))
    with pytest.raises(TypeError, match=r"zoneout=0.1 .*set regularizers = None to drop"):
        torch.jit.script(Model(fusedrnn.LSTM(3, 5, zoneout=0.1)).eval())


@every_class
def test_patching_torch_does_not_recurse(kind, monkeypatch):
    torchs, _ = pair(kind, 3, 5)
    monkeypatch.setattr(nn, kind, getattr(fusedrnn, kind))
    patched = getattr(nn, kind)(3, 5)
    patched.load_state_dict(torchs.state_dict())
    assert type(patched).__module__ == "fusedrnn.modules"
    input = sample(kind)
    assert_same(first(patched(input)), first(torchs(input)), "patched")
    assert_same(first(copy.deepcopy(patched)(input)), first(torchs(input)), "copied")
    assert_same(first(pickle.loads(pickle.dumps(patched))(input)), first(torchs(input)), "pickled")
    report = fusedrnn.restore_modules(patched)
    assert report.swapped
    assert type(patched) is type(torchs)


@every_class
def test_a_subclass_of_ours(kind):
    """Programs derive from nn.LSTM and override forward or reset_parameters."""

    class Own(getattr(fusedrnn, kind)):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.calls = 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return super().forward(*args, **kwargs)

    own = Own(3, 5)
    plain = getattr(nn, kind)(3, 5)
    own.load_state_dict(plain.state_dict())
    input = sample(kind)
    assert_same(first(own(input)), first(plain(input)), "subclass")
    assert own.calls == 1


MALFORMED = {
    "a step without rows": (torch.randn(6, 3), torch.tensor([3, 0, 3])),
    "more rows later": (torch.randn(5, 3), torch.tensor([1, 3, 1])),
    "fewer rows than they say": (torch.randn(5, 3), torch.tensor([3, 3])),
    "more rows than they say": (torch.randn(7, 3), torch.tensor([3, 3])),
    "no step": (torch.randn(0, 3), torch.tensor([], dtype=torch.int64)),
    "another dtype": (torch.randn(6, 3), torch.tensor([3, 3], dtype=torch.int32)),
}
PACKED_WAYS = {
    "auto": {},
    "aten": {"backend": "aten"},
    "reference": {"backend": "reference"},
    "regularizer": {"recurrent_dropout": 0.1},
    "input_dropout": {"input_dropout": 0.1},
}


@pytest.mark.parametrize("wrong", MALFORMED)
@pytest.mark.parametrize("way", PACKED_WAYS)
@every_kind
def test_a_malformed_packed_sequence_is_refused(kind, way, wrong):
    module = getattr(fusedrnn, kind)(3, 5, **PACKED_WAYS[way])
    with pytest.raises((RuntimeError, TypeError), match=r"batch_sizes: expected .*, got"):
        module(PackedSequence(*MALFORMED[wrong]))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_what_was_compiled_refuses_it_too(backend):
    """The compiler sees no values: the operator looks, when it runs."""
    torch._dynamo.reset()
    module = fusedrnn.GRU(3, 5, backend=backend)
    compiled = torch.compile(lambda p: module(p)[0].data, backend="aot_eager")
    compiled(pack_padded_sequence(torch.randn(2, 3, 3), torch.tensor([2, 2, 2])))
    for wrong in list(MALFORMED)[:4]:
        with pytest.raises(RuntimeError, match=r"batch_sizes: expected .*, got"):
            compiled(PackedSequence(*MALFORMED[wrong]))


@every_kind
def test_an_order_of_another_batch_is_refused(kind):
    module = getattr(fusedrnn, kind)(3, 5)
    packed = pack_padded_sequence(
        torch.randn(4, 3, 3), torch.tensor([2, 4, 3]), enforce_sorted=False
    )
    hx = module(packed)[1]
    wrong = packed._replace(sorted_indices=packed.sorted_indices[:2])
    with pytest.raises(RuntimeError, match=r"sorted_indices: expected shape \(3,\), .* got \(2,\)"):
        module(wrong, hx)

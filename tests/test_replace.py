"""replace_modules and restore_modules: what is swapped, what is kept, what is left and why."""

import copy
from pathlib import Path

import pytest
import torch
from tolerances import VALUES32
from torch import nn
from torch.nn.utils import parametrize

import fusedrnn

ROOT = Path(__file__).parents[1]
NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(4, 4, num_layers=2, dropout=0.0)
        self.same = self.gru
        self.cells = nn.ModuleDict({"a": nn.LSTMCell(4, 4), "b": nn.GRUCell(4, 4)})


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.lstm = nn.LSTM(4, 4, bidirectional=True, proj_size=2)
        self.inner = Inner()
        self.list = nn.ModuleList([nn.RNN(4, 4, nonlinearity="relu"), nn.RNNCell(4, 4)])

    def forward(self, input):
        x = self.embed(input)
        x, _ = self.lstm(x)
        x, _ = self.inner.gru(x)
        x, _ = self.list[0](x)
        h, _ = self.inner.cells["a"](x[-1])
        h = self.inner.cells["b"](h)
        return x, self.list[1](h)


RECURRENT = ("lstm", "inner.gru", "inner.cells.a", "inner.cells.b", "list.0", "list.1")


def test_swaps_everything_and_back():
    model = Model().eval()
    model.inner.gru.train()
    input = torch.randn(5, 2, 3)
    expected = model(input)
    before = {
        "parameters": dict(model.named_parameters()),
        "modules": {name: id(m) for name, m in model.named_modules()},
        "training": {name: m.training for name, m in model.named_modules()},
        "types": {name: type(m) for name, m in model.named_modules()},
        "repr": repr(model),
        "keys": list(model.state_dict()),
    }
    report = fusedrnn.replace_modules(model)
    assert set(report.swapped) == set(RECURRENT)
    assert report.left == {}
    for name in RECURRENT:
        module = model.get_submodule(name)
        assert type(module) is getattr(fusedrnn, before["types"][name].__name__)
    assert model.inner.same is model.inner.gru
    assert list(model.state_dict()) == before["keys"]
    assert repr(model) == before["repr"]
    assert {n: m.training for n, m in model.named_modules()} == before["training"]
    assert {n: id(m) for n, m in model.named_modules()} == before["modules"]
    for name, parameter in model.named_parameters():
        assert parameter is before["parameters"][name]
    torch.testing.assert_close(model(input), expected, rtol=0, atol=0)
    with fusedrnn.use_backend("reference"):
        torch.testing.assert_close(model(input), expected)

    again = fusedrnn.replace_modules(model)
    assert again.swapped == {}
    assert again.left == {}

    report = fusedrnn.restore_modules(model)
    assert set(report.swapped) == set(RECURRENT)
    assert {n: type(m) for n, m in model.named_modules()} == before["types"]
    torch.testing.assert_close(model(input), expected, rtol=0, atol=0)
    assert fusedrnn.restore_modules(model).swapped == {}


@pytest.mark.parametrize("name", NAMES)
def test_the_root_may_be_one(name):
    module = getattr(nn, name)(3, 4)
    report = fusedrnn.replace_modules(module)
    assert type(module) is getattr(fusedrnn, name)
    assert list(report.swapped) == [""]
    assert str(report).splitlines()[1] == f"  (the model): torch.nn.{name} -> fusedrnn.{name}"


def test_hooks_optimizer_and_references_survive():
    model = nn.Sequential(nn.LSTM(3, 4))
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alias = model[0]
    fusedrnn.replace_modules(model)
    before = alias.weight_hh_l0.detach().clone()
    output, _ = model(torch.randn(5, 2, 3))
    output.sum().backward()
    optimizer.step()
    assert seen == [fusedrnn.LSTM]
    assert not torch.equal(alias.weight_hh_l0, before)


def test_what_is_left_and_why():
    class Own(nn.LSTM):
        def forward(self, input, hx=None):
            return super().forward(input, hx)

    model = nn.ModuleDict(
        {
            "own": Own(3, 4),
            "normed": nn.utils.parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0"),
            "plain": nn.GRU(3, 4),
            "linear": nn.Linear(3, 4),
        }
    )
    report = fusedrnn.replace_modules(model)
    assert list(report.swapped) == ["plain"]
    assert set(report.left) == {"own", "normed"}
    assert "Own is a subclass" in report.left["own"]
    assert "parametrized" in report.left["normed"]
    assert type(model["own"]) is Own
    lines = str(report).splitlines()
    assert lines[0] == "1 module(s) swapped, 2 left"
    assert "  plain: torch.nn.GRU -> fusedrnn.GRU" in lines
    assert any(line.startswith("  own: left, ") for line in lines)


def test_what_torch_does_not_have_is_not_restored():
    kinds = [dict(zoneout=0.5), dict(clip_gradient=1.0), dict(recurrent_dropout=0.5, zoneout=0.5)]
    model = nn.ModuleList([*(fusedrnn.LSTM(3, 4, **kind) for kind in kinds), fusedrnn.GRU(3, 4)])
    report = fusedrnn.restore_modules(model)
    assert list(report.swapped) == ["3"]
    assert set(report.left) == {"0", "1", "2"}
    assert report.left["0"].startswith("torch.nn's LSTM has no zoneout=0.5 (set regularizers = No")
    assert type(model[0]) is fusedrnn.LSTM
    assert set(fusedrnn.restore_modules(model.eval()).left) == {"0", "2"}


def test_what_is_off_in_evaluation_is_no_obstacle():
    dropped = dict(input_dropout=0.2, recurrent_dropout=0.2, weight_drop=0.5, clip_gradient=1.0)
    model, x = fusedrnn.GRU(3, 4, **dropped).eval(), torch.randn(5, 2, 3)  # clipping: in the loop
    before, own = model(x)[0], model.regularizers
    assert fusedrnn.restore_modules(model).swapped
    assert type(model) is nn.GRU
    torch.testing.assert_close(model(x)[0], before, **VALUES32)
    fusedrnn.replace_modules(model)
    assert model.regularizers is own


def test_tools_that_look_for_torchs_classes():
    """README: restore_modules comes before quantize_dynamic and symbolic_trace."""
    model = nn.Sequential(nn.Linear(3, 3), fusedrnn.LSTM(3, 4))
    input = torch.randn(5, 2, 3)
    expected = model(input)[0]
    assert not isinstance(model[1], nn.LSTM)
    with pytest.raises(TypeError, match="got Proxy"):
        torch.fx.symbolic_trace(model)
    fusedrnn.restore_modules(model)
    assert torch.equal(torch.fx.symbolic_trace(model)(input)[0], expected)


def test_an_initialiser_asks_for_the_class_that_all_share():
    """README: model.apply with isinstance(m, torch.nn.LSTM) skips ours; RNNBase does not."""
    for name in ("LSTM", "GRU", "RNN"):
        for kind, found in ((getattr(nn, name), []), (nn.RNNBase, [f"0.{name}"])):
            module = nn.Sequential(getattr(fusedrnn, name)(3, 4))
            reached = [
                f"{n}.{type(m).__name__}" for n, m in module.named_modules() if isinstance(m, kind)
            ]
            assert reached == found
    assert "isinstance(m, torch.nn.RNNBase)" in (ROOT / "README.md").read_text()


def test_parametrized_after_the_swap():
    model = nn.Sequential(nn.GRU(3, 4))
    fusedrnn.replace_modules(model)
    twin = copy.deepcopy(model)
    fusedrnn.restore_modules(twin)
    for one in (model, twin):
        nn.utils.parametrizations.weight_norm(one[0], "weight_hh_l0")
    input = torch.randn(5, 2, 3)
    torch.testing.assert_close(model(input), twin(input), rtol=0, atol=0)
    left = fusedrnn.restore_modules(model).left
    assert "parametrized" in left["0"]
    parametrize.remove_parametrizations(model[0], "weight_hh_l0")
    assert type(model[0]) is fusedrnn.GRU


def test_a_swapped_model_can_be_copied_and_pickled(tmp_path):
    model = Model()
    fusedrnn.replace_modules(model)
    input = torch.randn(5, 2, 3)
    expected = model(input)
    torch.testing.assert_close(copy.deepcopy(model)(input), expected, rtol=0, atol=0)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh = Model()
    fresh.load_state_dict(torch.load(tmp_path / "state.pt"))
    torch.testing.assert_close(fresh(input), expected, rtol=0, atol=0)


def test_own_settings_do_not_outlive_ours():
    """A backend that was forced on the module has no meaning for torch's class."""
    module = fusedrnn.LSTM(3, 4, backend="reference")
    fusedrnn.restore_modules(module)
    input = torch.randn(5, 2, 3)
    twin = nn.LSTM(3, 4)
    twin.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(input), twin(input), rtol=0, atol=0)
    assert repr(module) == repr(twin)


def test_not_a_module():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        fusedrnn.replace_modules({})
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        fusedrnn.restore_modules([])

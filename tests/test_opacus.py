"""Opacus finds in our modules what it finds in torch.nn's: a clear refusal, and its fix."""

import subprocess
import sys

import pytest
import torch
from opacus import GradSampleModule
from opacus.layers import DPGRU, DPLSTM
from opacus.validators import ModuleValidator
from tolerances import GRADIENTS32
from torch import nn

import fusedrnn

# Of Opacus' own hooks, on their first module.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


class Classifier(nn.Module):
    """Reads the output and the final state."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(2 * rnn.hidden_size, 2)

    def forward(self, x):
        output, state = self.rnn(x)
        h_n = state[0] if isinstance(state, tuple) else state
        return self.head(torch.cat([output.mean(1), h_n[-1]], 1))


@pytest.mark.parametrize(
    ("cls", "theirs"), [(fusedrnn.LSTM, DPLSTM), (fusedrnn.GRU, DPGRU)], ids=["LSTM", "GRU"]
)
def test_the_validator_refuses_and_fix_gives_per_sample_gradients(cls, theirs):
    torch.manual_seed(0)
    model = Classifier(cls(3, 5, batch_first=True))
    (error,) = ModuleValidator.validate(model)
    assert f"fusedrnn.{cls.__name__}" in str(error)
    assert "drop-in replacement" in str(error)
    assert "ModuleValidator.fix" in str(error)
    fixed = ModuleValidator.fix(model)
    assert type(fixed.rnn) is theirs
    assert ModuleValidator.is_valid(fixed)

    x = torch.randn(4, 6, 3)
    GradSampleModule(fixed, loss_reduction="sum")(x).square().sum().backward()
    by_name = dict(fixed.named_parameters())
    for row in range(4):
        model.zero_grad()
        model(x[row : row + 1]).square().sum().backward()
        for name, own in model.named_parameters():
            (found,) = (p for n, p in by_name.items() if n.replace("cells.", "") == name)
            torch.testing.assert_close(found.grad_sample[row], own.grad, **GRADIENTS32)


def test_fix_does_not_forget_regularizers():
    model = Classifier(fusedrnn.LSTM(3, 5, recurrent_dropout=0.2))
    with pytest.raises(ValueError, match=r"no recurrent_dropout=0.2; set regularizers = None"):
        ModuleValidator.fix(model)


def test_fix_does_not_forget_heads():
    with pytest.raises(ValueError, match="GRU: Opacus' module has no heads, got num_heads=2"):
        ModuleValidator.fix(Classifier(fusedrnn.GRU(3, 6, num_heads=2)))


def test_fix_does_not_take_one_cell_for_another():
    with pytest.raises(ValueError, match=r"GRU: .* is torch's: torch has no gru_reset_before"):
        ModuleValidator.fix(Classifier(fusedrnn.GRU(3, 6, reset_after=False)))


def test_it_does_not_matter_what_was_imported_first():
    code = """
        import fusedrnn, sys
        assert "opacus" not in sys.modules
        model = fusedrnn.LSTM(3, 5)
        from opacus.validators import ModuleValidator
        print(len(ModuleValidator.validate(model)), type(ModuleValidator.fix(model)).__name__)
    """
    lines = "\n".join(line.strip() for line in code.splitlines())
    ran = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=300)
    assert ran.stdout.split() == ["1", "DPLSTM"], ran.stderr

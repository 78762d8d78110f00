"""What every test shares: fixed seeds, one thread, hypothesis settings, helpers by name."""

import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

# importlib mode leaves sys.path alone; tolerances.py and oracles.py are imported by name.
sys.path.insert(0, str(Path(__file__).parent))

# Before anything imports triton: without a GPU, whatever runs a kernel interprets it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# No deadline: the first call of an operator may load a library. No example database: a run
# depends on nothing but the source. FUSEDRNN_EXAMPLES=500 searches further than CI does.
hypothesis.settings.register_profile(
    "fusedrnn",
    deadline=None,
    database=None,
    derandomize="FUSEDRNN_EXAMPLES" not in os.environ,
    print_blob=True,
    max_examples=int(os.environ.get("FUSEDRNN_EXAMPLES", "120")),
)
hypothesis.settings.load_profile("fusedrnn")


@pytest.fixture
def imaginary_gpu(monkeypatch):
    """A GPU with a plan for every layer."""
    from fusedrnn.backends import triton

    monkeypatch.setattr(triton, "_no_plan", lambda *layer: None)


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(20)


@pytest.fixture(autouse=True)
def _compiles_afresh():
    """The many modules of this suite share code, of which torch.compile keeps eight versions."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture(autouse=True)
def _forgets_cells():
    """What a test registers is not there for the next one."""
    from fusedrnn.cells import _cell

    tables = _cell.REGISTRY, _cell._PROJECTED
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tensors here are tiny; threads would only fight over the cores with the other worker."""
    torch.set_num_threads(1)

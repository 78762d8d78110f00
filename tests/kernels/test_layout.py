"""Every launch that exchanges looks at the layout of its compiled kernel, once."""

from types import SimpleNamespace

import pytest
import torch
import triton
from scan_cases import Case, Layout, problem

from fusedrnn.cells import REGISTRY
from fusedrnn.kernels import launch, layout
from fusedrnn.kernels.plan import Plan

MULTI_BLOCK = Plan("multi_block", 16, 16, 32, 1, 1, 2, 2, "sentinel")
# What Triton prints, cut down to the lines that count.
GOOD = """
#blocked = #ttg.blocked<{sizePerThread = [1, 8], threadsPerWarp = [32, 1], warpsPerCTA = [2, 1], order = [1, 0]}>
    %x = tt.elementwise_inline_asm "{}" {constraints = "=&r,l", packed_element = 8 : i32, pure = false} %at : tensor<64x8xi64, #blocked> -> tensor<64x8xf16, #blocked> loc(#loc)
"""  # noqa: E501


class Compiled:
    """What a launch returns, as far as it is looked at."""

    def __init__(self, ttgir):
        self.asm, self.reads = {"ttgir": ttgir}, 0
        self.name = "scan_forward_kernel"

    @property
    def metadata(self):
        self.reads += 1
        return SimpleNamespace(num_warps=2, name=self.name)


@pytest.fixture
def scan(monkeypatch):
    """Runs a forward pass whose kernel does nothing but compile to what is given."""

    def run(compiled, plan=MULTI_BLOCK):
        kernel = SimpleNamespace(run=lambda **arguments: compiled)
        kernel_of_grid = type("Kernel", (), {"__getitem__": lambda self, grid: kernel.run})()
        monkeypatch.setattr(launch, "scan_forward_kernel", kernel_of_grid)
        case = Case(REGISTRY["gru"], T=2, B=3, H=32, D=1, dtype=torch.float16)
        p = problem(case)
        layout_of_rows = Layout(case, p.lengths)
        launch.scan_forward(
            case.cell, layout_of_rows.pack(p.x_gates), p.directions(), p.state,
            rows=layout_of_rows.rows, save=None, input_precision="ieee", plan=plan,
        )  # fmt: skip

    return run


def test_a_good_layout_is_looked_at_once(scan):
    compiled = Compiled(GOOD)
    scan(compiled)
    first = compiled.reads
    scan(compiled)
    assert compiled.reads == first > 0


@pytest.mark.parametrize(
    ("ttgir", "message"),
    [
        (GOOD.replace("[32, 1]", "[16, 2]"), "a tile of 64x8 lies as #ttg.blocked"),
        (GOOD.replace("#blocked =", "#linear ="), "a tile of 64x8 lies as #blocked"),
        (GOOD.replace("64x8xi64", "128x8xi64"), "a tile of 128x8 goes into 8 elements"),
        ("", "no assembly that loads"),
    ],
)
def test_another_layout_is_an_error_that_names_triton(ttgir, message, scan):
    compiled = Compiled(ttgir)
    for _ in range(2):  # and stays one
        with pytest.raises(RuntimeError, match=f"Triton {triton.__version__} .*{message}"):
            scan(compiled)


def test_nothing_is_looked_at_where_nothing_is_exchanged(scan):
    compiled = Compiled("")
    scan(compiled, Plan("single_block", 16, 32, 32, 1, 1, 1, 4))
    assert compiled.reads == 0


def test_the_error_names_the_kernel_and_what_hides_its_layout():
    compiled = Compiled("")
    compiled.asm = {"cubin": b""}
    with pytest.raises(RuntimeError, match=r"scan_forward_kernel .*TRITON_STORE_BINARY_ONLY"):
        layout.check(compiled)

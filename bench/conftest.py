"""Options and the closing table of `pytest bench`.

pytest bench                          this machine's shapes, timed by pytest-benchmark
pytest bench --benchmark-disable      every benchmark once, tiny: none may rot
pytest bench/test_overhead.py         fusedrnn's modules against torch.nn's, in us
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# importlib mode leaves sys.path alone; `bench` is a package of the repository's root.
ROOT = str(Path(__file__).parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

FIGURES = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption(
        "--most-overhead", type=float, default=None, metavar="FACTOR",
        help="fail where a module takes more than this many times torch.nn's time, beyond noise",
    )  # fmt: skip


def pytest_configure(config):
    config.stash[FIGURES] = []


@pytest.fixture(scope="session")
def tiny(request) -> bool:
    """Whether to run each benchmark once, at a size that takes milliseconds."""
    return bool(request.config.getoption("benchmark_disable"))


@pytest.fixture(scope="session")
def device(tiny):
    from bench.device import pick_device

    return pick_device(compiles="" if tiny else "inductor")


@pytest.fixture(scope="session")
def figures(request) -> list[tuple[str, float, float, str]]:
    """(what, milliseconds of torch.nn, of ours, the difference in words), shown at the end."""
    return request.config.stash[FIGURES]


def pytest_terminal_summary(terminalreporter, config):
    figures = config.stash.get(FIGURES, [])
    if not figures:
        return
    terminalreporter.section("fusedrnn's time less torch.nn's, calls alternating")
    for what, theirs, own, figure in figures:
        terminalreporter.write_line(
            f"{what:38} torch.nn {theirs:9.4f} ms, fusedrnn {own:9.4f} ms   {figure}"
        )

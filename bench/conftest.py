"""Options and the closing table of `pytest bench`.

pytest bench                          this machine's shapes, timed by pytest-benchmark
pytest bench --benchmark-disable      every benchmark once, tiny: none may rot
pytest bench/test_overhead.py         fusedrnn's modules against torch.nn's, as ratios
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# importlib mode leaves sys.path alone; `bench` is a package of the repository's root.
ROOT = str(Path(__file__).parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

RATIOS = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption(
        "--most-overhead", type=float, default=None, metavar="FACTOR",
        help="fail where a module takes more than this many times torch.nn's time (1.03)",
    )  # fmt: skip


def pytest_configure(config):
    config.stash[RATIOS] = []


@pytest.fixture(scope="session")
def tiny(request) -> bool:
    """Whether to run each benchmark once, at a size that takes milliseconds."""
    return bool(request.config.getoption("benchmark_disable"))


@pytest.fixture(scope="session")
def device(tiny):
    from bench.device import pick_device

    return pick_device(compiles="" if tiny else "inductor")


@pytest.fixture(scope="session")
def ratios(request) -> list[tuple[str, float, float, float]]:
    """(what, ratio, microseconds of torch.nn, of ours), shown at the end."""
    return request.config.stash[RATIOS]


def pytest_terminal_summary(terminalreporter, config):
    ratios = config.stash.get(RATIOS, [])
    if not ratios:
        return
    terminalreporter.section("fusedrnn's time over torch.nn's, calls alternating")
    for what, ratio, theirs, own in ratios:
        terminalreporter.write_line(
            f"{what:44} {ratio:6.3f}   torch.nn {theirs:10.1f} us, fusedrnn {own:10.1f} us"
        )

"""A pytest plugin (`-p per_file`): what was run, one line per file, in place of dots."""

import importlib.metadata
from collections import Counter, defaultdict

import torch

OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def pytest_report_header() -> str:
    found = ", ".join(
        f"{name} {version(name)}" for name in ("fusedrnn", "torch", "triton", "numpy")
    )
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return f"{found}; CUDA device: {cuda}"


def pytest_report_teststatus(report):
    """No dots: the table at the end says it, and failures are listed by pytest."""
    if report.when == "call" and report.passed and not hasattr(report, "wasxfail"):
        return "passed", "", "PASSED"
    return None


def pytest_terminal_summary(terminalreporter) -> None:
    counts: dict[str, Counter] = defaultdict(Counter)
    seconds: Counter = Counter()
    for outcome in OUTCOMES:
        for report in terminalreporter.stats.get(outcome, ()):
            file = report.nodeid.split("::")[0]
            counts[file][outcome] += 1
            seconds[file] += getattr(report, "duration", 0.0)
    terminalreporter.section("what was run")
    for file in sorted(counts):
        numbers = ", ".join(f"{counts[file][o]} {o}" for o in OUTCOMES if counts[file][o])
        terminalreporter.write_line(f"{seconds[file]:8.1f} s  {file:<44} {numbers}")

"""What the exchange compiles to: the fences and barriers that the protocols rest on are there.

PTX is cut into straight runs of instructions. What must come between two accesses must come in
the same run, before or after one of them, so that no path goes round it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NVIDIA = (
    "counter:bf16:90",
    "counter:fp32:80",
    "ll:bf16:90",
    "ll:fp32:80",
    "flags:bf16:90",
    "sentinel:bf16:90",
)
AMD = "counter:bf16:gfx942"

BARRIER = r"bar\.sync"
RELEASE = r"(atom|red)\.global\.gpu\.release"
ACQUIRE = r"(ld|atom)\.global\.(gpu\.)?(acquire\.gpu|acquire)"
PUBLISH = r"st\.global\.cg"
READ_L2 = r"ld\.global\.cg"
POLL = r"ld\.volatile\.global"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    cache = tmp_path_factory.mktemp("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, HERE / "compile_exchange.py", *NVIDIA, AMD],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def runs(ptx: str) -> list[list[str]]:
    """Runs of instructions without a label or a branch."""
    found: list[list[str]] = [[]]
    for line in ptx.splitlines():
        text = line.strip()
        if re.match(r"\$L__BB", text) or re.search(r"\bbra\b", text):
            found.append([])
        elif text and not text.startswith(("//", ".", "$", "{", "}")):
            found[-1].append(text)
    return found


def places(run: list[str], pattern: str) -> list[int]:
    return [i for i, text in enumerate(run) if re.search(pattern, text)]


def lacks(ptx: str, protocol: str) -> list[str]:
    """What the assembly of a protocol ought to have and has not."""
    missing = []
    everything = [text for run in runs(ptx) for text in run]
    if not places(everything, PUBLISH):
        missing.append("stores past L1")
    if protocol in ("counter", "flags"):
        missing += _lacks_fences(ptx, everything)
    polls = {"counter": ACQUIRE, "flags": POLL, "ll": POLL, "sentinel": POLL}[protocol]
    if len(places(everything, polls)) < 2:  # once before the loop, and in the loop
        missing.append("polls")
    if protocol == "ll" and not any(_after_poll(run) for run in runs(ptx)):
        missing.append("a barrier after the poll")
    return missing


def _lacks_fences(ptx: str, everything: list[str]) -> list[str]:
    missing = []
    releases = acquired_reads = 0
    for run in runs(ptx):
        for release in places(run, RELEASE):
            releases += 1
            stored = max((i for i in places(run, PUBLISH) if i < release), default=release)
            if not any(stored < i < release for i in places(run, BARRIER)):
                missing.append("a barrier between the stores and the release")
        for read in places(run, READ_L2):
            acquired_reads += 1
            acquired = max((i for i in places(run, ACQUIRE) if i < read), default=-1)
            if not any(acquired < i < read for i in places(run, BARRIER)):
                missing.append("a barrier between the acquire and the loads")
    if not releases:
        missing.append("a release")
    if not places(everything, ACQUIRE):
        missing.append("an acquire")
    if not acquired_reads:
        missing.append("loads past L1")
    return missing


def _after_poll(run: list[str]) -> bool:
    """The run in which a timeout is noted, where the poll's loop ends: a barrier follows."""
    errors = places(run, r"st\.global\.b32")
    return bool(errors) and any(i > errors[0] for i in places(run, BARRIER))


@pytest.mark.parametrize("name", NVIDIA)
def test_ptx_has_what_the_protocol_rests_on(name, compiled):
    assert lacks(compiled[name], name.split(":")[0]) == []


@pytest.mark.parametrize(
    ("name", "pattern", "replacement", "missing"),
    [
        ("counter:bf16:90", r"\.release", ".relaxed", "a release"),
        ("counter:bf16:90", r"\.acquire", ".relaxed", "an acquire"),
        ("counter:bf16:90", r"bar\.sync", "nop", "a barrier between the stores and the release"),
        ("counter:bf16:90", r"bar\.sync", "nop", "a barrier between the acquire and the loads"),
        ("counter:bf16:90", r"ld\.global\.cg", "ld.global", "loads past L1"),
        ("flags:bf16:90", r"\.acquire", ".relaxed", "an acquire"),
        ("flags:bf16:90", r"ld\.volatile", "ld", "polls"),
        ("ll:bf16:90", r"ld\.volatile", "ld", "polls"),
        ("ll:bf16:90", r"bar\.sync", "nop", "a barrier after the poll"),
        ("sentinel:bf16:90", r"st\.global\.cg", "st.global", "stores past L1"),
    ],
)
def test_the_check_can_fail(name, pattern, replacement, missing, compiled):
    broken = re.sub(pattern, replacement, compiled[name])
    assert missing in lacks(broken, name.split(":")[0])


def test_words_of_ll_are_read_and_written_whole(compiled):
    for name, width in (("ll:bf16:90", "b32"), ("ll:fp32:80", "b64")):
        ptx = compiled[name]
        assert set(re.findall(r"ld\.volatile\.global(?:\.v\d)?\.(\w+)", ptx)) == {width}
        assert set(re.findall(r"st\.global\.cg(?:\.v\d)?\.(\w+)", ptx)) == {width}


def test_amd_does_not_wait_for_the_stores_of_other_waves(compiled):
    """Why the exchange is not promised on AMD: the release waits for the stores of its own wave
    only, and Triton's block barrier does not wait for those of the others. When this fails, a
    newer Triton waits, and the counter may be sound there."""
    code = [line.split(";")[0].strip() for line in compiled[AMD].splitlines()]
    code = [text for text in code if text and not text.startswith(".")]
    assert any(text.startswith("buffer_wbl2") for text in code)  # the release
    assert any(text.startswith("buffer_inv") for text in code)  # the acquire
    release = next(i for i, text in enumerate(code) if text.startswith("buffer_wbl2"))
    store = max(i for i in range(release) if code[i].startswith("global_store_short"))
    barrier = code.index("s_barrier", store)
    assert store < barrier < release
    assert not any("vmcnt(0)" in text for text in code[store:barrier])

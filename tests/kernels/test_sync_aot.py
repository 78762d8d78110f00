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
NAMES = (
    "counter:bf16:90",
    "counter:fp32:80",
    "sentinel:bf16:90",
    "sentinel:bf16:80",
    "sentinel:fp32:80",
)

BARRIER = r"bar\.sync"
RELEASE = r"(atom|red)\.global\.gpu\.release"
ACQUIRE = r"(ld|atom)\.global\.(gpu\.)?(acquire\.gpu|acquire)"
PUBLISH = r"st\.relaxed\.gpu\.global\.b(16|32) .*; mov"
READ = r"^ld\.relaxed\.gpu\.global\.v4\.b32"
READ_AGAIN = r"^@late\d+ ld\.relaxed\.gpu\.global\.v4\.b32"
VECTORS = {"bf16": 3, "fp32": 6}  # of the three chunks


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    cache = tmp_path_factory.mktemp("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, HERE / "compile_exchange.py", *NAMES],
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
        if re.match(r"(\$L__BB\w+|[A-Z_]+):", text) or re.search(r"\bbra\b", text):
            found.append([])
        elif text and not text.startswith(("//", ".", "$", "{", "}")):
            found[-1].append(text)
    return [run for run in found if run]


def places(run: list[str], pattern: str) -> list[int]:
    return [i for i, text in enumerate(run) if re.search(pattern, text)]


def lacks(ptx: str, name: str) -> list[str]:
    """What the assembly of a protocol ought to have and has not, or must not have."""
    protocol, dtype, _ = name.split(":")
    cut = runs(ptx)
    everything = [text for run in cut for text in run]
    missing = []
    if len(places(everything, PUBLISH)) != (2 if protocol == "counter" else 3):
        missing.append("relaxed stores")  # of h_0 and h_t, and of what takes them back
    if len(places(everything, READ)) != VECTORS[dtype]:
        missing.append("relaxed loads of 16 bytes")
    releases = [(run, place) for run in cut for place in places(run, RELEASE)]
    for run, release in releases:
        stored = max((i for i in places(run, PUBLISH) if i < release), default=-1)
        if not any(stored < i < release for i in places(run, BARRIER)):
            missing.append("a barrier between the stores and the release")
        if protocol == "sentinel" and places(run, PUBLISH):
            missing.append("steps without a release")
    if not releases:
        missing.append("a release")
    acquires = [n for n, run in enumerate(cut) if places(run, ACQUIRE)]
    if len(acquires) < 2:  # once before the loop, and in the loop
        missing.append("an acquire")
    elif not any(places(run, BARRIER) for run in cut[acquires[-1] + 1 :][:2]):
        missing.append("a barrier between the acquire and the loads")
    polls = re.findall(r"^AGAIN:$(.*?)^DONE:$", ptx, re.DOTALL | re.MULTILINE)
    if protocol == "sentinel":
        again = [line for poll in polls for line in poll.splitlines()]
        if len(places(again, READ_AGAIN)) != VECTORS[dtype] or len(polls) != 2:
            missing.append("polls")
        if places(again, BARRIER):
            missing.append("polls without a barrier")
    elif polls:
        missing.append("loads that are not repeated")
    return missing


@pytest.mark.parametrize("name", NAMES)
def test_ptx_has_what_the_protocol_rests_on(name, compiled):
    assert lacks(compiled[name], name) == []


COUNTER, SENTINEL = "counter:bf16:90", "sentinel:bf16:90"


@pytest.mark.parametrize(
    ("name", "pattern", "replacement", "missing"),
    [
        *(
            change
            for name in (COUNTER, SENTINEL)
            for change in (
                (name, r"\.release", ".relaxed", "a release"),
                (name, r"\.gpu\.release", ".cta.release", "a release"),
                (name, r"\.acquire", ".relaxed", "an acquire"),
                (name, BARRIER, "nop", "a barrier between the stores and the release"),
                (name, BARRIER, "nop", "a barrier between the acquire and the loads"),
                (name, r"ld\.relaxed\.gpu", "ld", "relaxed loads of 16 bytes"),
                (name, r"st\.relaxed\.gpu", "st", "relaxed stores"),
                (name, r"st\.relaxed\.gpu", "st.relaxed.cta", "relaxed stores"),
            )
        ),
        (SENTINEL, r"@late0 ld", "@late0 mov", "polls"),
        (SENTINEL, r"@missing bra AGAIN", "bar.sync 0", "polls without a barrier"),
        (SENTINEL, r"(st\.relaxed.*mov)", r"bar.sync 0;\natom.global.gpu.release;\n\1",
         "steps without a release"),
        (COUNTER, r"(ld\.relaxed.*)", r"AGAIN:\n\1\nDONE:", "loads that are not repeated"),
    ],
)  # fmt: skip
def test_the_check_can_fail(name, pattern, replacement, missing, compiled):
    broken = re.sub(pattern, replacement, compiled[name])
    assert missing in lacks(broken, name)


def test_pairs_are_compared_where_the_gpu_can(compiled):
    assert "min.s16x2" in compiled["sentinel:bf16:90"]
    assert "min.s16x2" not in compiled["sentinel:bf16:80"]

"""What the exchange compiles to: the fences and barriers that it rests on are there.

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
NAMES = ("bf16:90", "bf16:80", "fp32:80")

BARRIER = r"bar\.sync"
RELEASE = r"(atom|red)\.global\.gpu\.release"
ACQUIRE = r"^ld\.acquire\.gpu\.global\.b32"
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
    """What the assembly ought to have and has not, or must not have."""
    dtype, _ = name.split(":")
    cut = runs(ptx)
    everything = [text for run in cut for text in run]
    missing = []
    if len(places(everything, PUBLISH)) != 3:
        missing.append("relaxed stores")  # of h_0 and h_t, and of what takes them back
    if len(places(everything, READ)) != VECTORS[dtype]:
        missing.append("relaxed loads of 16 bytes")
    releases = [(run, place) for run in cut for place in places(run, RELEASE)]
    for run, release in releases:
        stored = max((i for i in places(run, PUBLISH) if i < release), default=-1)
        if not any(stored < i < release for i in places(run, BARRIER)):
            missing.append("a barrier between the stores and the release")
        if places(run, PUBLISH):
            missing.append("steps without a release")
    if not releases:
        missing.append("a release")
    # The chunks are read in two groups, and each thread waits before the first.
    polls = re.findall(
        r"^WAIT:$(.*?)^READ:$(.*?)^AGAIN:$(.*?)^DONE:$", ptx, re.DOTALL | re.MULTILINE
    )
    waits, reads, again = (
        [line for poll in polls for line in poll[i].splitlines()] for i in range(3)
    )
    if not polls or len(places(waits, ACQUIRE)) != len(polls):
        missing.append("an acquire")
    if len(places(reads, READ)) != VECTORS[dtype]:
        missing.append("loads behind the acquire")
    if len(places(again, READ_AGAIN)) != VECTORS[dtype] or len(polls) != 2:
        missing.append("polls")
    if places([*waits, *again], BARRIER):
        missing.append("polls without a barrier")
    return missing


@pytest.mark.parametrize("name", NAMES)
def test_ptx_has_what_the_exchange_rests_on(name, compiled):
    assert lacks(compiled[name], name) == []


@pytest.mark.parametrize(
    ("pattern", "replacement", "missing"),
    [
        (r"\.release", ".relaxed", "a release"),
        (r"\.gpu\.release", ".cta.release", "a release"),
        (r"\.acquire", ".relaxed", "an acquire"),
        (r"\.acquire\.gpu", ".acquire.cta", "an acquire"),
        (BARRIER, "nop", "a barrier between the stores and the release"),
        (r"ld\.relaxed\.gpu", "ld", "relaxed loads of 16 bytes"),
        (r"(?m)^READ:$\n(ld\..*)", r"\1\nREAD:", "loads behind the acquire"),
        (r"st\.relaxed\.gpu", "st", "relaxed stores"),
        (r"st\.relaxed\.gpu", "st.relaxed.cta", "relaxed stores"),
        (r"@late0 ld", "@late0 mov", "polls"),
        (r"@missing bra WAIT", "bar.sync 0", "polls without a barrier"),
        (r"bra AGAIN", "bar.sync 0", "polls without a barrier"),
        (r"(st\.relaxed.*mov)", r"bar.sync 0;\natom.global.gpu.release;\n\1",
         "steps without a release"),
    ],
)  # fmt: skip
def test_the_check_can_fail(pattern, replacement, missing, compiled):
    broken = re.sub(pattern, replacement, compiled["bf16:90"])
    assert missing in lacks(broken, "bf16:90")


def test_pairs_are_compared_where_the_gpu_can(compiled):
    assert "min.s16x2" in compiled["bf16:90"]
    assert "min.s16x2" not in compiled["bf16:80"]

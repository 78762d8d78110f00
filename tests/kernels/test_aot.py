"""A sample of the ahead-of-time suite: `python bench/aot.py` compiles all of it.

In a process of its own, because the tests beside this one have put Triton into its interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")

AOT = Path(__file__).parents[2] / "bench" / "aot.py"
SAMPLE = [
    "--target sm_90 --cell lstm --hidden 768 --dtype bf16 --batch 16",
    "--target sm_80 gfx942 --cell rnn_tanh --hidden 300 --dtype fp32 --precision tf32 --batch 16",
]


@pytest.mark.parametrize("options", SAMPLE)
def test_compiles_to_what_the_design_relies_on(options, tmp_path):
    output = tmp_path / "results.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, AOT, *options.split(), "--workers", "1", "--output", output],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = list(json.loads(output.read_text()).values())
    assert {r["which"] for r in results} == {"forward", "backward"}
    for result in results:
        assert result["faults"] == [], result
        if result["target"] == "sm_90":
            assert result["spill"] == 0, result
            assert result["weights"] == "shared", result


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1"])
def test_no_plan_in_the_committed_table_spills(version):
    table = AOT.parent / "results" / "aot" / f"triton-{version}.json"
    results = [r for r in json.loads(table.read_text()).values() if r["target"] == "sm_90"]
    for dtype in ("fp16", "bf16", "fp32"):
        found = {(r["cell"], r["which"], r["H"]) for r in results if r["dtype"] == dtype}
        assert len(found) == 4 * 2 * 12, (version, dtype)
    assert [r for r in results if r["spill"] or r["faults"]] == []

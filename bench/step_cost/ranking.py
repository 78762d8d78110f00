"""Does the plan's estimate order its candidates as the meter does?

    python -m bench.step_cost.ranking

Compiles every plan that the planner may choose from, for the layers whose times the ahead-of-time
pages name, and compares `plan.cycles` with the meter: the ratio of both, and Spearman's rank
correlation over all, each in microseconds of a step of the whole batch. kernels/README.md states
what came out.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor

import triton

from bench import aot
from bench.aot_suite import MADE_FOR, NAMED, Named
from bench.calibrate import rank_correlation
from bench.step_cost import parameters
from bench.step_cost.read import disassemble, read
from fusedrnn.cells import REGISTRY
from fusedrnn.kernels.plan import ITEM_SIZE, PASSES, Plan, candidates, cycles, placed

DEVICE = aot.TARGETS[MADE_FOR]
OUT = aot.ROOT / "out" / "ranking.json"


def both(named: Named, which: str, plan: Plan) -> dict:
    """Microseconds of a step by the estimate and by the meter."""
    cell, dtype = REGISTRY[named.cell], aot.DTYPES[named.dtype]
    item = ITEM_SIZE[dtype]
    plan, launches, programs = placed(plan, named.H, 1, named.B, DEVICE)
    estimate = cycles(
        plan, cell, which, item, named.H, "tf32" if item == 4 else "16-bit", programs, DEVICE
    )
    job = aot.Job(
        MADE_FOR, named.cell, which, "gates", named.dtype, "tf32", named.H, plan, plain=True
    )
    compiled = aot.compile_job(job)
    reading = read(
        compiled.asm["ptx"], disassemble(compiled.asm["cubin"]), plan, named.H,
        aot.resources(compiled), B=named.B, multiprocessors=DEVICE.multiprocessors,
        parameters=parameters.load(),
    )  # fmt: skip
    ghz = parameters.Parameters().clock_ghz.middle
    return {
        "layer": named.name, "pass": which, "schedule": plan.schedule,
        "block_h": plan.block_h, "split_k": plan.split_k, "launches": launches,
        "estimated_us": launches * estimate / ghz / 1e3, "predicted_us": reading.predicted_us,
        "spill": reading.spill, "parts_us": reading.parts_us,
    }  # fmt: skip


def main() -> int:
    aot.require_compiler()
    wanted = [
        (named, which, plan)
        for named in NAMED
        for which in PASSES
        for plan in candidates(
            REGISTRY[named.cell], which, aot.DTYPES[named.dtype], named.H, DEVICE, "tf32"
        )
        if placed(plan, named.H, 1, named.B, DEVICE) is not None
    ]
    rows = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for n, row in enumerate(pool.map(both, *zip(*wanted, strict=True)), 1):
            rows.append(row)
            print(
                f"{n}/{len(wanted)} {row['layer']:24} {row['pass']:8} {row['schedule']:9} "
                f"{row['block_h']:3}/{row['split']} x{row['launches']}  "
                f"estimated {row['estimated_us']:6.2f}  meter {row['predicted_us']:6.2f}  "
                f"{row['estimated_us'] / row['predicted_us']:.2f}",
                flush=True,
            )
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=1) + "\n")
    found = rank_correlation(
        [row["estimated_us"] for row in rows], [row["predicted_us"] for row in rows]
    )
    print(f"Triton {triton.__version__}: rank correlation {found:.3f} over {len(rows)} candidates")
    return 0


if __name__ == "__main__":
    sys.exit(main())

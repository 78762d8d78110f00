"""Compiles what the planner chooses and prints what was read of it, as JSON: one line a kernel.

python compile_plans.py '[["sm_90", "lstm", "forward", "bf16", "tf32", 768, 16]]'
"""

import json
import sys

from bench import aot
from fusedrnn.cells import REGISTRY
from fusedrnn.kernels.plan import plan_scan

for target, cell, which, dtype, precision, H, B in json.loads(sys.argv[1]):
    plan = plan_scan(
        REGISTRY[cell], which, aot.DTYPES[dtype], B=B, H=H, D=1,
        device=aot.TARGETS[target], input_precision=precision,
    )  # fmt: skip
    job = aot.Job(target, cell, which, "gates", dtype, precision, H, plan, plain=True)
    print(json.dumps(aot.run_job(job)), flush=True)

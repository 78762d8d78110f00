"""Compiles what the planner chooses and prints what was read of it, as JSON: one line a kernel.

python compile_plans.py '[["sm_90", "lstm", "forward", "bf16", "tf32", 768, 16]]'
"""

import json
import sys

from bench import aot

for layer in json.loads(sys.argv[1]):
    print(json.dumps(aot.run_job(aot.planned(*layer))), flush=True)

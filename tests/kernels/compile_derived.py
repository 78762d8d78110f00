"""Compiles both passes of a derived cell that uses all functions, and prints the faults."""

import json

import steps

import fusedrnn
from bench import aot

fusedrnn.cell(gates=("u", "v"), states=("h",), params=("w",))(steps.everything)
jobs = {
    p: aot.planned("sm_90", "everything", p, "bf16", "tf32", 8, 16) for p in ("forward", "backward")
}
print(json.dumps({p: aot.run_job(job)["faults"] for p, job in jobs.items()}))

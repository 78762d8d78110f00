"""Results that nobody measured, for tests of what is made from results."""

from bench import timing
from bench.run import FIELDS
from bench.timing import STRETCHES


def rows_of(shape, pass_="training", tier="planes", **times):
    """A row for each backend: of its milliseconds, alike in every call, of its samples in seconds,
    or (None) of a wrong result."""
    samples = {
        name: [[1e-3 * t]] * STRETCHES if isinstance(t, int | float) else t
        for name, t in times.items()
    }
    rows = []
    for backend, own in samples.items():
        row = {**shape.fields(), "tier": tier, "pass": pass_, "backend": backend}
        row |= dict.fromkeys(FIELDS)
        row |= {"ran_on": "triton" if backend == "auto" else backend, "first_call_s": 0.5}
        if own is None:
            row["error"] = "wrong: output is off by 1"
        else:
            row |= {**timing.statistics_of(own), "calls": 20, "peak_bytes": 10**7}
            row["ms_p90"] = 1.2 * row["ms"]
            if samples.get("torch_nn"):
                row["ms_torch_nn"] = timing.statistics_of(samples["torch_nn"])["ms"]
                row |= timing.against(samples["torch_nn"], own)
        rows.append(row)
    return rows


def results_of(rows, kind="cuda", device="Some GPU", date="2026-01-02T03:04:05Z"):
    return {
        "schema": 2,
        "environment": {"device": device, "kind": kind, "commit": "abc", "dirty": False,
                        "date": date, "torch": "2", "triton": "3", "cudnn": 9},
        "conditions": {"clock": "CUDA events"},
        "limits": None, "left_out": {}, "stopped": "", "points": {}, "rows": rows,
    }  # fmt: skip

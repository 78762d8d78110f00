"""Results that nobody measured, for tests of what is made from results."""

from bench.measure import FIELDS, add_ratios


def rows_of(shape, which="training", tier="planes", **milliseconds):
    rows = []
    for backend, ms in milliseconds.items():
        row = {**shape.fields(), "tier": tier, "pass": which, "backend": backend}
        row |= dict.fromkeys(FIELDS)
        row |= {"ran_on": "triton" if backend == "auto" else backend, "first_call_s": 0.5}
        if ms is None:
            row["error"] = "wrong: output is off by 1"
        else:
            row |= {"ms": ms, "ms_p10": 0.9 * ms, "ms_p90": 1.1 * ms, "calls": 9,
                    "floor_ms": 0.1, "peak_bytes": 10**7}  # fmt: skip
        rows.append(row)
    add_ratios(rows)
    return rows


def results_of(rows, kind="cuda", device="Some GPU", date="2026-01-02T03:04:05Z"):
    return {
        "schema": 1,
        "environment": {"device": device, "kind": kind, "commit": "abc", "dirty": False,
                        "date": date, "torch": "2", "triton": "3", "cudnn": 9},
        "conditions": {"clock": "CUDA events", "cache": "warm"},
        "limits": None, "left_out": {}, "stopped": "", "points": {}, "rows": rows,
    }  # fmt: skip

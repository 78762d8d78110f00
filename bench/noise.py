"""What can be said of two programs on a noisy machine, and what cannot.

Other programs, interrupts and clocks only ever add to the time of a call, at times a hundredfold,
and for seconds on end. So:

- Both sides take turns, call by call, in an order drawn anew for every turn (`bench.measure`).
- A run is STRETCHES stretches, one after the other. A stretch has one figure: the ratio (or the
  difference) of the two sides' low quantiles in it. The figure of the run is their median.
- The interval leaves out the TRIMMED smallest and the TRIMMED largest figures of the stretches.

What the interval covers: let both sides be the same program. Whatever the noise is like (it may
drift, come in bursts, last for seconds), which side it met in a turn was drawn at random, so a
stretch's ratio falls on either side of 1 with equal chance, independently of the others. All but
TRIMMED of them are on one side, the interval beyond 1, with the chance FALSE_ALARM, about 1 in
2,500 points. It does not cover what stays the same for a whole run, as where in memory a side's
tensors happen to lie; another run draws that anew.

Why the tenth part: on a machine with two programs too many, the interval was narrowest at the
minimum and at the tenth part of the calls, two to three times wider at the median; and a minimum
rests on a single call, however odd. A stretch of fewer than ten calls gives its fastest.
"""

from __future__ import annotations

import math
import statistics

STRETCHES = 20
TRIMMED = 2
LOW = 0.1
FALSE_ALARM = 2 * sum(math.comb(STRETCHES, n) for n in range(TRIMMED + 1)) / 2**STRETCHES

Samples = list[list[float]]  # seconds of a call: a list for each stretch, in the order of turns


def quantile(times: list[float], q: float) -> float:
    return sorted(times)[int(q * len(times))]


def with_interval(parts: list[float]) -> tuple[float, float, float]:
    """The median of STRETCHES figures, and the ends of its interval."""
    ordered = sorted(parts)
    return statistics.median(ordered), ordered[TRIMMED], ordered[-1 - TRIMMED]


def against(theirs: Samples, own: Samples) -> dict[str, float | None]:
    """`ratio` (theirs / own) and `overhead_us` (own - theirs), each with `_low` and `_high`.

    Of a stretch count the turns that both took: a quantile of more calls would be a lower one.
    """
    pairs = []
    for a, b in zip(theirs, own, strict=True):
        both = min(len(a), len(b))
        pairs.append((quantile(a[:both], LOW), quantile(b[:both], LOW)))
    figures = {
        "ratio": (with_interval([a / b for a, b in pairs]), 4),
        "overhead_us": (with_interval([1e6 * (b - a) for a, b in pairs]), 3),
    }
    return {
        f"{name}{end}": round_to(value, digits)
        for name, (values, digits) in figures.items()
        for end, value in zip(("", "_low", "_high"), values, strict=True)
    }


def statistics_of(samples: Samples) -> dict[str, float | None]:
    """`ms`, the low quantile of all calls in milliseconds; `ms_p50` and `ms_p90` show the noise."""
    times = [time for stretch in samples for time in stretch]
    return {
        name: round_to(quantile(times, q) * 1e3, 5)
        for name, q in (("ms", LOW), ("ms_p50", 0.5), ("ms_p90", 0.9))
    }


def round_to(value: float, digits: int) -> float | None:
    """`value` with that many significant digits; None where it is no finite number."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def same_kernels(row: dict) -> bool:
    """Whether a results row ran the kernels of torch that torch.nn runs: its cost is the module's
    own, in microseconds, and it has no speed-up."""
    return row["ran_on"] == "aten"


def verdict(row: dict) -> str:
    """Of a row's ratio to torch.nn: "faster", "slower", or that noise could be all of it."""
    if row["ratio_low"] > 1:
        return "faster"
    return "slower" if row["ratio_high"] < 1 else "cannot be told apart"


def overhead_is_clear(row: dict) -> bool:
    """Whether a row's overhead is beyond noise, above or below 0."""
    return not row["overhead_us_low"] <= 0 <= row["overhead_us_high"]


def microseconds(value: float) -> str:
    return f"{value:+.0f}" if abs(value) >= 10 else f"{value:+.1f}"


def figure(row: dict) -> str:
    """A row against torch.nn, in words."""
    if not row["ratio"]:
        return "-"
    if same_kernels(row):
        value, low, high = (row[f"overhead_us{end}"] for end in ("", "_low", "_high"))
        unclear = "" if overhead_is_clear(row) else ", cannot be told from none"
        return f"{microseconds(value)} us ({microseconds(low)} to {microseconds(high)}){unclear}"
    said = verdict(row)
    unclear = f", {said}" if said == "cannot be told apart" else ""
    return f"{row['ratio']:.2f}x ({row['ratio_low']:.2f} to {row['ratio_high']:.2f}){unclear}"

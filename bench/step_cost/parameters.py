"""What the clock model of a step assumes of the hardware: every figure with its range and source.

None of these is in the machine code. Where a committed results file of the same kind of GPU has
measured one (bench/limits.py, `limits.clocks`), the measured value is taken instead.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

from bench import results

LEVELS = ("low", "middle", "high")


@dataclass(frozen=True)
class Range:
    """`low` is what makes a step fastest, whichever of the numbers is smaller."""

    low: float
    middle: float
    high: float
    unit: str
    source: str


_LUO = "Luo et al., Benchmarking and Dissecting the NVIDIA Hopper GPU, arXiv:2402.13499"
_L2 = "arXiv:2501.12084, latencies: near and far partition of L2, hit and miss"
_B300 = "community measurements on a B300, taken as ratios"
_ESTIMATE = "no publication; estimated from the latencies"


@dataclass(frozen=True)
class Parameters:
    """Latencies, issue intervals and rates of one multiprocessor."""

    clock_ghz: Range = Range(1.7, 1.7, 1.7, "GHz", "H100 SXM under load, between base and boost")
    # From a load's issue to its value: one that hits L2, one that does not.
    l2_load: Range = Range(250, 300, 400, "clocks", _L2)
    dram_load: Range = Range(520, 650, 900, "clocks", _L2)
    # From a store until a load of another multiprocessor can see it.
    store_visible: Range = Range(140, 180, 260, "clocks", "half of l2_load, " + _ESTIMATE)
    # How much later than it could be a poll sees what it waits for.
    poll_phase: Range = Range(100, 120, 250, "clocks", "half a poll's trip, " + _ESTIMATE)
    shared_load: Range = Range(29, 30, 33, "clocks", _LUO)
    ldmatrix: Range = Range(30, 33, 36, "clocks", "shared_load and 4 wavefronts")
    shuffle: Range = Range(23, 24, 26, "clocks", "as on Volta, arXiv:1804.06826")
    special: Range = Range(18, 24, 42, "clocks", "MUFU: tanh 18, rcp 42: " + _B300)
    mma: Range = Range(24, 33, 33, "clocks", "24.1, about 32 with float32 sums: " + _LUO)
    barrier: Range = Range(14, 20, 30, "clocks", "38 with its issue, of 8 warps: " + _B300)
    # From one instruction to the next in one of the four schedulers.
    special_clocks: Range = Range(8, 8, 8, "clocks", "CUDA C++ Programming Guide: 16 a clock")
    mma_clocks: Range = Range(6.5, 8, 8, "clocks", "1024 multiply-adds a clock: " + _LUO)
    # From L2 into one multiprocessor, and into all of them.
    l2_bytes_per_clock: Range = Range(
        64, 45, 24, "bytes a clock", "a multiprocessor's port; its share of 5.5 TB/s: " + _LUO
    )
    l2_bytes_of_all: Range = Range(
        4100, 3200, 2600, "bytes a clock", "5.5 TB/s at 1.7 GHz, and a fifth to both sides: " + _LUO
    )

    def at(self, level: str) -> SimpleNamespace:
        """One number each: all low, all middle or all high."""
        return SimpleNamespace(
            **{f.name: getattr(getattr(self, f.name), level) for f in fields(self)}
        )


def load(folder: Path = results.FOLDER, capability: str = "sm_90") -> Parameters:
    """The table, with what the newest results of such a GPU have measured.

    Raises:
        ValueError: a results file measured something that is no parameter, or no positive number.
    """
    parameters = Parameters()
    runs = [run for device in results.load_folder(folder).values() for run in device]
    for run in sorted(runs, key=lambda run: run["environment"]["date"]):
        if run["environment"].get("capability") != capability:
            continue
        for name, value in (run.get("limits") or {}).get("clocks", {}).items():
            table = getattr(parameters, name, None)
            if not isinstance(table, Range) or not value > 0:
                raise ValueError(
                    f"{run['path']}: limits.clocks: expected positive numbers of "
                    f"{[f.name for f in fields(Parameters)]}, got {name!r}: {value!r}"
                )
            measured = Range(value, value, value, table.unit, f"measured, {run['path']}")
            parameters = replace(parameters, **{name: measured})
    return parameters

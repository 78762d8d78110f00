"""What no compiled time loop may show: each of these has cost a multiple of a step's time."""

from __future__ import annotations

from bench.step_cost.read import Reading

# Clocks of shared memory over those without bank conflicts. The kernels are made for sm_90; on the
# others a plan may lose a little.
MOST_WAVEFRONTS = {"sm_80": 1.5, "sm_89": 1.5, "sm_90": 1.25, "sm_120": 1.5}


def gate(reading: Reading, target: str) -> list[str]:
    """What is wrong with a kernel; empty for a good one, and for targets that are only reported."""
    if target not in MOST_WAVEFRONTS:
        return []
    found = []
    most = MOST_WAVEFRONTS[target]
    if reading.wavefronts > most * reading.ideal_wavefronts:
        found.append(
            f"bank conflicts: {reading.wavefronts} wavefronts a step, more than {most} times the "
            f"{reading.ideal_wavefronts} without conflicts"
        )
    if reading.unknown:
        found.append(f"shared memory at unknown addresses: {reading.unknown[0]}")
    if reading.spill:
        found.append(f"{reading.spill} bytes spilled")
    if target != "sm_90":
        return found
    if not reading.ring_loads:
        found.append("no way round the loop reads what others stored and orders nothing")
    if reading.serial_waits > reading.planned_waits:
        found.append(
            f"loads of the ring wait for one another {reading.serial_waits} times a step, "
            f"{reading.planned_waits} planned"
        )
    if reading.early:
        found.append(f"fetched ahead, and waited for before the poll: {reading.early[0]}")
    if reading.fences:
        found.append(f"{reading.fences} fences, acquires or atomics in every step")
    if reading.spin_barriers:
        found.append(f"{reading.spin_barriers} block barriers in a spin")
    return found

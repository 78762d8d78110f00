"""The model's formulas, by hand, with units."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from bench import limits as module
from bench.device import Device
from bench.limits import Limits, call_bytes, call_floor, call_flops, interpolate, step_of
from bench.shapes import Shape

# 4 gates, B=8, H=100, bf16: weights 4 * 100 * 100 * 2 = 80 kB, which one program's registers hold.
SMALL = Shape("lstm", "bf16", 10, 8, 100, 100)


def test_arithmetic_of_one_program(limits):
    alone = replace(limits, multiprocessors=1, flops={"bf16": 1e12})
    step = step_of(SMALL, alone)
    assert step.hidden_tiles == step.batch_tiles == 1
    assert step.arithmetic == pytest.approx(2 * 8 * 4 * 100 * 100 / 1e12)  # FLOP / (FLOP/s) = s
    assert step.weights == 0  # 80 kB stay in 100 kB of registers
    assert step.exchange == step.roundtrip == 0
    assert step.seconds == step.arithmetic


def test_a_batch_below_eight_costs_as_much_as_eight(limits):
    alone = replace(limits, multiprocessors=1, flops={"bf16": 1e12})
    one = step_of(replace(SMALL, B=1), alone)
    assert one.arithmetic == step_of(SMALL, alone).arithmetic


def test_weights_beyond_the_registers_come_from_shared_memory(limits):
    # 180 kB: 100 kB in registers, 80 kB at 200 GB/s.
    assert limits.weights_seconds(180_000, 1) == pytest.approx(80_000 / 2e11)
    # 400 kB: 200 kB from shared memory, 100 kB from L2, which 10 programs share.
    assert limits.weights_seconds(400_000, 10) == pytest.approx(
        max(200_000 / 2e11, 10 * 100_000 / 5e12)
    )
    assert limits.weights_seconds(100_000, 1) == 0


def test_spreading_pays_the_round_trip_only_where_it_gains(limits):
    # One program needs 2*8*4*100*100 / 1e12 = 0.64 us, less than any round trip.
    assert step_of(SMALL, limits).hidden_tiles == 1
    large = step_of(replace(SMALL, H=1000), limits)
    assert large.hidden_tiles > 1
    assert large.roundtrip == limits.trip(large.hidden_tiles)
    assert large.seconds == pytest.approx(
        max(max(large.arithmetic, large.weights) + large.roundtrip, large.exchange)
    )
    assert large.bound_by == "roundtrip"


def test_the_exchange_of_backward_is_all_gates_wide(limits):
    shape = replace(SMALL, H=1000, B=64)
    forward, backward = step_of(shape, limits), step_of(shape, limits, backward=True)
    programs = forward.hidden_tiles * forward.batch_tiles
    rows = math.ceil(64 / forward.batch_tiles)
    assert forward.exchange == pytest.approx(programs * rows * 1000 * 2 / 5e12)
    assert backward.seconds >= forward.seconds


def test_the_round_trip_is_that_of_the_number_of_programs(limits):
    assert limits.trip(1) == 0
    assert limits.trip(2) == 1e-6
    assert limits.trip(16) == pytest.approx(1.25e-6)  # halfway from 2 to 128 in logarithms
    assert limits.trip(1000) == 1.5e-6


def test_interpolate():
    points = [(2, 1.0), (8, 3.0)]
    assert interpolate(points, 1) == 1.0
    assert interpolate(points, 4) == 2.0
    assert interpolate(points, 8) == 3.0
    assert interpolate(points, 99) == 3.0


def test_flops_of_a_call():
    # Layer 0: I=3, layer 1: 2 directions of 5; 4 gates; T*B = 6.
    shape = Shape("lstm", "bf16", 2, 3, 3, 5, 2, True)
    by_hand = sum(2 * 6 * 2 * 4 * 5 * (inputs + 5) for inputs in (3, 10))
    assert call_flops(shape, "forward") == call_flops(shape, "inference") == by_hand
    assert call_flops(shape, "training") == 3 * by_hand


def test_packed_input_is_counted_by_its_rows():
    padded = Shape("gru", "bf16", 64, 8, 32, 32)
    packed = replace(padded, lengths="text")
    assert call_flops(packed, "forward") < call_flops(padded, "forward")


def test_bytes_of_a_call():
    shape = Shape("gru", "fp32-exact", 2, 3, 4, 5)
    weights = 3 * 5 * (4 + 5 + 2)
    assert call_bytes(shape, "inference") == 4 * (2 * 3 * 4 + weights + 2 * 3 * 5)


def test_a_call_is_its_steps_and_a_launch(limits):
    call = call_floor(SMALL, "inference", limits)
    assert call.bound_by == "loop"
    assert call.loop == pytest.approx(10 * step_of(SMALL, limits).seconds)
    assert call.seconds == pytest.approx(call.loop + 2e-6)
    training = call_floor(SMALL, "training", limits)
    assert training.loop == pytest.approx(
        call.loop + 10 * step_of(SMALL, limits, backward=True).seconds
    )


def test_a_stack_may_overlap_its_layers(limits):
    stack = replace(SMALL, layers=4)
    in_turn = 4 * 10 * step_of(stack, limits).seconds
    overlapped = (10 + 3) * step_of(stack, limits, among=4).seconds
    assert module.loop_seconds(stack, limits, False) == pytest.approx(min(in_turn, overlapped))
    both = replace(stack, bidirectional=True)
    assert module.loop_seconds(both, limits, False) == pytest.approx(
        4 * 10 * step_of(both, limits).seconds
    )


def test_packed_steps_have_fewer_rows(limits):
    packed = Shape("gru", "bf16", 64, 200, 512, 512, lengths="text")
    sizes = module.batch_sizes(packed)
    assert sum(sizes.values()) == 64
    assert sum(rows * count for rows, count in sizes.items()) == module.steps_in(packed)
    by_hand = sum(
        count * step_of(replace(packed, B=rows), limits).seconds for rows, count in sizes.items()
    )
    loop = module.loop_seconds(packed, limits, False)
    assert loop == pytest.approx(by_hand)
    assert loop < module.loop_seconds(replace(packed, lengths=""), limits, False)


def test_more_work_never_has_a_lower_floor(limits):
    for which in ("inference", "training"):
        for axis, along in (("B", (1, 8, 64, 256)), ("H", (64, 300, 1024)), ("T", (1, 64, 1024)),
                            ("layers", (1, 2, 4))):  # fmt: skip
            floors = [
                call_floor(replace(SMALL, **{axis: value}), which, limits).seconds
                for value in along
            ]
            assert floors == sorted(floors), (which, axis)


def test_a_large_batch_is_bound_by_arithmetic(limits):
    big = Shape("lstm", "bf16", 64, 100_000, 1024, 1024)
    assert call_floor(big, "inference", limits).bound_by == "arithmetic"


def test_limits_survive_json(limits):
    import json

    assert Limits.from_dict(json.loads(json.dumps(limits.as_dict()))) == limits


def test_an_unknown_rate_gives_no_floor(limits):
    assert call_floor(SMALL, "inference", replace(limits, flops={})) is None


def test_a_cpu_is_measured(monkeypatch):
    def half_a_second(device, call, repeats=25):
        call()
        return 0.5

    monkeypatch.setattr(module, "best_seconds", half_a_second)
    measured = module.measure_limits(Device())
    assert measured.multiprocessors == 1
    assert measured.flops["fp32-exact"] == pytest.approx(2 * 768**3 / 0.5)
    assert measured.dram == pytest.approx(2 * 2**27 / 0.5)
    assert [size for size, _ in measured.caches] == [
        4 * n * n for n in (64, 128, 256, 512, 1024, 2048)
    ]
    rates = [rate for _, rate in measured.caches]
    assert rates == sorted(rates, reverse=True)
    assert not measured.failed
    assert call_floor(replace(SMALL, dtype="fp32-exact"), "training", measured).seconds > 0


def test_what_fails_is_named():
    failed = {}

    def roundtrip(programs, device, steps):
        if programs == 8:
            raise RuntimeError("timed out\nafter a while")
        return -1.0 if programs == 2 else 1.5

    trips = module.roundtrips(Device(), failed, roundtrip, counts=(2, 4, 8))
    assert trips == {4: pytest.approx(1.5e-6)}  # a negative difference is noise
    assert failed == {"round trip 8": "RuntimeError: timed out"}


# A machine: clocks of an operation of each probe, and of nothing; a tenth of a microsecond each
# hundred and seventy clocks.
MACHINE = {
    "l2_load": 270.0, "dram_load": 600.0, "poll": 290.0,
    "hand_over": 450.0, "shared_load": 30.0, "ldmatrix": 33.0, "shuffle": 24.0, "special": 18.0,
    "mma": 33.0, "barrier": 20.0, "special_clocks": 8.0, "mma_clocks": 8.5,
}  # fmt: skip


def run_on(machine):
    """As `limits_kernels.run_probe`; every second run of a kind is disturbed."""
    from bench.limits_kernels import PROBES

    calls = itertools.count()

    def run(name, repeats):
        cycles = 5000 + machine[name] * PROBES[name].each * repeats
        cycles *= 1 + next(calls) % 2
        return cycles, cycles / 1.7

    return run


def test_the_meters_parameters():
    failed = {}
    found = module.clocks(run_on(MACHINE), failed, multiprocessors=133, l2=133 * 1.7e9 * 24)
    assert failed == {}
    same = set(MACHINE) - {"poll", "hand_over"}
    assert found == pytest.approx({name: MACHINE[name] for name in same} | {
        "clock_ghz": 1.7,
        "poll_phase": 145.0,
        "store_visible": 450 - 270 / 2 - 145,
        "l2_bytes_per_clock": 24.0,
    })  # fmt: skip


def test_a_parameter_that_cannot_be_measured_is_named():
    def run(name, repeats):
        if name == "poll":
            raise RuntimeError("no such instruction\nat line 3")
        return run_on(MACHINE | {"shuffle": -1.0})(name, repeats)

    failed = {}
    found = module.clocks(run, failed, multiprocessors=132, l2=0.0)
    missing = {"poll_phase", "store_visible", "l2_bytes_per_clock", "shuffle"}
    assert failed["clocks poll"] == "RuntimeError: no such instruction"
    assert failed["clocks poll_phase"] == "ValueError: poll was not measured"
    assert failed["clocks shuffle"].startswith("ValueError: came out as -1")
    assert set(failed) == {f"clocks {name}" for name in (*missing, "poll")}
    assert not missing & set(found)
    assert found["barrier"] == pytest.approx(20)


def test_a_broken_device_ends_the_measuring():
    def run(name, repeats):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        module.clocks(run, {}, 132, 0.0)


def test_a_gpu_is_measured(monkeypatch):
    """All of it but the kernels, which need one."""
    from bench import limits_kernels, roundtrip

    gpu = Device()
    gpu.torch = SimpleNamespace(type="cuda")
    gpu.properties = SimpleNamespace(multi_processor_count=132, L2_cache_size=50 << 20)
    monkeypatch.setattr(module, "matmul_rate", lambda device, dtype, size: 1e14)
    monkeypatch.setattr(module, "copy_rate", lambda device, size: 3e12)
    for name, value in (("l2_rate", 132 * 1.7e9 * 24), ("shared_rate", 2e11),
                        ("launch_seconds", 2e-6), ("shared_bytes", 232_448)):  # fmt: skip
        monkeypatch.setattr(limits_kernels, name, lambda device, v=value: v)
    monkeypatch.setattr(roundtrip, "roundtrip", lambda n, device, steps: 1.5)
    run = run_on(MACHINE)
    names = {id(probe): name for name, probe in limits_kernels.PROBES.items()}
    monkeypatch.setattr(
        limits_kernels, "run_probe", lambda device, probe, repeats: run(names[id(probe)], repeats)
    )
    lines = []
    measured = module.measure_limits(gpu, lines.append)
    assert measured.failed == {}
    assert measured.clocks["store_visible"] == pytest.approx(450 - 270 / 2 - 145)
    assert measured.clocks["l2_bytes_per_clock"] == pytest.approx(24)
    assert measured.caches == ()
    assert any("mma 33" in line for line in lines)


def test_limits_of_before_have_no_clocks(limits):
    import json

    values = json.loads(json.dumps(replace(limits, clocks={"mma": 33.0}).as_dict()))
    assert Limits.from_dict(values).clocks == {"mma": 33.0}
    del values["clocks"]
    assert Limits.from_dict(values).clocks == {}

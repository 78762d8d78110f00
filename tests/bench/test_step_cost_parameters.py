"""What the clock model assumes: every figure has a source, and a measurement replaces it."""

import json
from dataclasses import fields

import pytest

from bench.results import SCHEMA
from bench.step_cost import parameters
from bench.step_cost.parameters import LEVELS, Parameters, Range

TABLE = Parameters()
NAMES = [f.name for f in fields(Parameters)]
FASTER_WHEN_LARGER = ("l2_bytes_per_clock", "l2_bytes_of_all")


def results(folder, name, clocks, capability="sm_90", date="2026-01-01T00:00:00"):
    environment = {"device": "Imaginary GPU", "date": date, "capability": capability}
    content = {
        "schema": SCHEMA,
        "environment": environment,
        "rows": [],
        "limits": {"clocks": clocks},
    }
    path = folder / "imaginary-gpu" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_range_a_unit_and_a_source(name):
    value = getattr(TABLE, name)
    assert isinstance(value, Range)
    numbers = [value.low, value.middle, value.high]
    assert numbers == sorted(numbers, reverse=name in FASTER_WHEN_LARGER)
    assert min(numbers) > 0
    assert value.unit in ("clocks", "GHz", "bytes a clock")
    assert len(value.source) > 10


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_has_one_number_of_each(level):
    assert vars(TABLE.at(level)) == {name: getattr(getattr(TABLE, name), level) for name in NAMES}


def test_a_measured_value_replaces_the_tables(tmp_path):
    results(tmp_path, "1.json", {"poll_phase": 512.0, "clock_ghz": 1.98})
    loaded = parameters.load(tmp_path, "sm_90")
    phase = loaded.poll_phase
    assert (phase.low, phase.middle, phase.high) == (512, 512, 512)
    assert phase.source.endswith("1.json")
    assert phase.unit == TABLE.poll_phase.unit
    assert loaded.clock_ghz.middle == 1.98
    assert loaded.l2_load == TABLE.l2_load


def test_the_newest_measurement_counts(tmp_path):
    results(tmp_path, "a.json", {"poll_phase": 700.0}, date="2026-02-02T00:00:00")
    results(tmp_path, "b.json", {"poll_phase": 512.0, "mma": 30.0}, date="2026-01-01T00:00:00")
    loaded = parameters.load(tmp_path, "sm_90")
    assert (loaded.poll_phase.middle, loaded.mma.middle) == (700, 30)


def test_another_kind_of_gpu_does_not_count(tmp_path):
    results(tmp_path, "1.json", {"poll_phase": 512.0}, capability="sm_80")
    assert parameters.load(tmp_path, "sm_90") == TABLE
    assert parameters.load(tmp_path, "sm_80") != TABLE


@pytest.mark.parametrize("clocks", [{"fence": 1.0}, {"poll_phase": 0.0}, {"at": 3.0}])
def test_what_is_no_parameter_is_an_error(tmp_path, clocks):
    results(tmp_path, "1.json", clocks)
    with pytest.raises(ValueError, match=r"1\.json: limits\.clocks: expected positive numbers of"):
        parameters.load(tmp_path, "sm_90")

"""Benchmarks: fusedrnn against torch.nn, everyone else, and the limit of the machine.

    python -m bench.run          measure, within a budget, into one results file
    python -m bench.limits       what the machine at hand can do at best
    python -m bench.calibrate    the step-cost meter's error on a GPU, its parameters refitted
    python -m bench.report       REPORT.md and its pictures, from the results files
    pytest bench                 the same shapes under pytest-benchmark

Run from the root of the repository.
"""

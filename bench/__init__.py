"""Benchmarks: fusedrnn against torch.nn, everyone else, and the limit of the machine.

bench/README.md says which command does what, and what a results file holds.
"""

"""Packages live in two top-level folders: fusedrnn/ and kernels/ (imported as fusedrnn.kernels)."""

from setuptools import setup

setup(
    packages=[
        "fusedrnn",
        "fusedrnn.backends",
        "fusedrnn.backends.loop",
        "fusedrnn.cells",
        "fusedrnn.kernels",
    ],
    package_dir={"fusedrnn": "fusedrnn", "fusedrnn.kernels": "kernels"},
    package_data={"fusedrnn": ["py.typed", "*.json"], "fusedrnn.kernels": ["*.json"]},
)

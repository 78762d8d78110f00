"""Calls that nobody makes, for what decides about them."""

import torch

from fusedrnn.call import Call, Spec


def call_of(cell="lstm", **facts):
    """A call of 5 steps of 2 rows on the CPU, but for `facts`: fields of a Call or of its Spec."""
    spec = {"cell": cell, "input_size": 3, "hidden_size": 4}
    spec |= {name: facts.pop(name) for name in list(facts) if name in Spec._fields}
    call = {"device": "cpu", "dtype": torch.float32, "T": 5, "B": 2, **facts}
    return Call(Spec(**spec), **{**call, "device": torch.device(call["device"])})

"""Which backend would run a module on an input, and why."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import dispatch, stack
from fusedrnn.dispatch import Explanation
from fusedrnn.modules import CellModule, Recurrent
from fusedrnn.types import Lengths, Reset


def explain(
    module: nn.Module,
    input: Tensor | PackedSequence,
    hx: Tensor | tuple[Tensor, ...] | None = None,
    *,
    lengths: Lengths | None = None,
    reset: Reset[Tensor | tuple[Tensor, ...]] | None = None,
    return_states: bool = False,
) -> Explanation:
    """Which backend `module(input, hx, ...)` would run on, and what the others lack.

    Args:
        module: an LSTM, GRU, RNN, Recurrent or one of the cells, of fusedrnn.
        input, hx, lengths, reset, return_states: as the module takes them.
    Returns:
        an Explanation, which prints well; `.backend` is the name.
    Raises:
        TypeError: `module` is not one of fusedrnn's.
        TypeError, ValueError, RuntimeError: whatever the call itself would raise before it runs,
            such as that a backend is forced that cannot run it.
    """
    if isinstance(module, CellModule):
        call, *_ = stack.gather(module._given(input, hx))
        backend = dispatch.forced_backend(module.backend)
        if backend == "auto" and not call.transformed:
            backend = "aten"  # a single step is torch's own cell, unless that cannot
        if backend == "aten":
            call = call._replace(autocast=False)  # which is not oneDNN's
        return dispatch.explain_call(call._replace(spec=call.spec._replace(backend=backend)))
    if not isinstance(module, Recurrent):
        raise TypeError(
            f"module: expected one of fusedrnn's modules, got {type(module).__name__}; "
            f"use replace_modules on a model of torch.nn's"
        )
    given = module._given(input, hx, lengths, reset, return_states)
    call, *_ = stack.gather(given)
    explanation = dispatch.explain_call(call)
    if stack.is_torchs_own(given) and stack.is_one_step(given):
        because = explanation.because.replace("own kernels", "operators for a single step", 1)
        explanation = explanation._replace(because=because)
    return explanation

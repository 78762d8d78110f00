"""A layer of an LSTM by oneDNN's own operators, in a compiled training step on a CPU.

They are what torch.lstm is made of there, but hand out what oneDNN's backward reads: its
workspace. An op cannot carry an autograd graph across, and without that memory backward would have
to compute forward again. Only oneDNN knows how large it is, and an op has to say so before it runs:
so a single byte of it travels, as a view that keeps the rest alive.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fusedrnn.backends import aten, stretch
from fusedrnn.call import (
    Call,
    Masks,
    Operands,
    Spec,
    directions,
    reverses,
    weights_per_direction,
)

LSTM = 2  # torch's number for the kind of network


def keeps_workspace(call: Call) -> bool:
    """Whether a call that torch's operators run is split so that forward keeps its workspace."""
    spec = call.spec
    return (
        torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and call.needs_grad
        and spec.cell == "lstm"
        and not spec.proj_size
        and call.device.type == "cpu"
        and (call.autocast or call.dtype in (torch.float32, torch.bfloat16))
    )


def forward(spec: Spec, operands: Operands, masks: Masks) -> list[Tensor] | None:
    """One layer: [output, *final states, *what `backward` needs, as `kept_like` has it]; or None,
    where torch.lstm would not take oneDNN, or oneDNN has no kernel for such tensors, or an extra
    step of `stretch` failed."""
    switches = torch.backends.mkldnn
    if not (switches.is_available() and torch._C._get_mkldnn_enabled() and operands.input.numel()):
        return None
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        found = aten.if_possible(lambda: _forward(spec, _computed(spec, operands), masks))
    if found is None:
        return None
    h, c = aten.output_dtypes(spec, operands.input, operands.state, masks)
    return [*(t.to(dtype) for t, dtype in zip(found, (h, h, c), strict=False)), *found[3:]]


def _forward(spec: Spec, operands: Operands, masks: Masks) -> list[Tensor] | None:
    found, kept = [], []
    for d, (where, reverse, given) in enumerate(_directions(spec, operands, masks)):
        options = (reverse, [], LSTM, spec.hidden_size, 1, spec.bias, False, False, True)
        # Without gradients oneDNN keeps nothing.
        with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad():
            steps, h_n, c_n, workspace = torch.ops.aten.mkldnn_rnn_layer(*given, *options)
        kept += [c_n, workspace.as_strided((1,), (1,))]
        if where is None:
            found.append((_turned(spec, steps), h_n, c_n))
        elif stretch.failed(where, steps, c_n):
            return None
        else:
            found.append(stretch.results(where, steps, c_n, [s[d] for s in operands.state]))
    outputs, *finals = zip(*found, strict=True)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    output = output.contiguous().view(*operands.input.shape[:-1], output.shape[-1])
    return [output, *(torch.stack(states) for states in finals), *kept]


def kept_like(spec: Spec, operands: Operands) -> list[Tensor]:
    """Tensors like those that `forward` keeps for `backward`, 0: every run gives the same."""
    input, (_, c) = operands.input, operands.state
    like = [(c.shape[1:], _dtype(spec, input)), ((1,), torch.uint8)] * directions(spec)
    return [c.new_zeros(shape, dtype=dtype) for shape, dtype in like]


def has_workspace(kept: list[Tensor]) -> bool:
    """Whether the workspace is still there: a copy of what was kept has its first byte alone.

    It holds four gates, of two bytes or more each, for every number in c_n, and that in each step.
    """
    pairs = zip(kept[::2], kept[1::2], strict=True)
    return all([byte.untyped_storage().nbytes() > max(1, 8 * c_n.numel()) for c_n, byte in pairs])


def backward(
    spec: Spec,
    d_outputs: list[Tensor],
    operands: Operands,
    masks: Masks,
    output: Tensor,
    kept: list[Tensor],
) -> list[Tensor]:
    """The gradients of `operands.flat()`, from those of the output and of the final states."""
    originals, operands = operands.flat(), _computed(spec, operands)
    d_inputs, d_states, d_weights = [], [], []
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        output, d_output, d_h, d_c = (t.to(operands.input.dtype) for t in (output, *d_outputs))
        parts = [t.chunk(directions(spec), -1) for t in (output, d_output)]
        for d, (where, reverse, given) in enumerate(_directions(spec, operands, masks)):
            (own, d_own), d_final = (part[d] for part in parts), [d_h[d], d_c[d]]
            c_n, byte = kept[2 * d : 2 * d + 2]
            if where is None:
                own, d_own = (_turned(spec, t).contiguous() for t in (own, d_own))
                gradients = (d_own, *(t.contiguous() for t in d_final))
            else:  # h of an extra step counts for nothing: what reads it has closed its gates
                own, d_own = (t.reshape(-1, t.shape[-1]) for t in (own, d_own))
                own, (d_own, d_c_n) = (
                    where.stretched(own),
                    stretch.d_results(where, d_own, *d_final),
                )
                gradients = (d_own, None, d_c_n)
            results = (own, own[0 if reverse else -1], c_n)
            options = (reverse, LSTM, spec.hidden_size, 1, spec.bias, True, False, [], False)
            workspace = byte.as_strided((byte.untyped_storage().nbytes(),), (1,))
            d_x, d_ih, d_hh, d_bias, _, *d_state = torch.ops.aten.mkldnn_rnn_layer_backward(
                *given, *results, *gradients, *options, workspace
            )
            if where is None:
                d_x = _turned(spec, d_x)
            else:
                d_x, d_ih, d_state = stretch.d_given(where, d_x, d_ih, d_state, d_final)
            d_inputs.append(d_x)
            d_states.append(d_state)
            d_weights += [d_ih, d_hh] + [d_bias, d_bias.clone()] * spec.bias
        d_input = d_inputs[0] if len(d_inputs) == 1 else d_inputs[0] + d_inputs[1]
        both = [torch.stack(states) for states in zip(*d_states, strict=True)]
        found = (d_input.reshape(originals[0].shape), *both, *d_weights)
        # oneDNN's are float32, whatever it computed in.
        return [d.to(t.dtype).contiguous() for d, t in zip(found, originals, strict=True)]


def _computed(spec: Spec, operands: Operands) -> Operands:
    """The operands in the dtype of the computation: as in `aten.forward`, under autocast."""
    if not spec.autocast:
        return operands
    low = getattr(torch, spec.autocast)
    return aten.rounded(spec, operands, low, _dtype(spec, operands.input))


def _dtype(spec: Spec, input: Tensor) -> torch.dtype:
    """In which the layer is computed."""
    if not spec.autocast:
        return input.dtype
    return torch.bfloat16 if spec.autocast == "bfloat16" else torch.float32


def _turned(spec: Spec, sequence: Tensor) -> Tensor:
    """[T, B, *], from [B, T, *] with batch_first; and the way back."""
    return sequence.transpose(0, 1) if spec.batch_first else sequence


def _directions(
    spec: Spec, operands: Operands, masks: Masks
) -> Iterator[tuple[stretch.Plan | None, bool, list[Tensor]]]:
    """Of each direction, how its rows were stretched, if they were; whether oneDNN is to run it
    backwards; and what oneDNN is given: x, W_ih, W_hh, two biases, even if there are none, h, c."""
    if aten.stretched(spec, operands.input.device, masks):
        for where, x, h, c, weights in stretch.directions_of(spec, operands, masks):
            yield where, False, [x, *_with_biases(weights), h, c]
        return
    x, size = _turned(spec, operands.input).contiguous(), weights_per_direction(spec)
    for d, reverse in enumerate(reverses(spec)):
        weights = list(operands.weights[d * size : (d + 1) * size])
        yield None, reverse, [x, *_with_biases(weights), *(s[d] for s in operands.state)]


def _with_biases(weights: list[Tensor]) -> list[Tensor]:
    zeros = [] if len(weights) == 4 else [weights[0].new_zeros(len(weights[0]))] * 2
    return [w.contiguous() for w in (*weights, *zeros)]

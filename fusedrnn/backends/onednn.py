"""A layer of an LSTM by oneDNN's own operators, in a compiled training step on a CPU.

They are what torch.lstm is made of there, but hand out what oneDNN's backward reads: its
workspace. An op cannot carry an autograd graph across, and without that memory backward would have
to compute forward again. Only oneDNN knows how large it is, and an op has to say so before it runs:
so a single byte of it travels, as a view that keeps the rest alive.
"""

import torch
from torch import Tensor

from fusedrnn.backends import aten
from fusedrnn.call import Call, Masks, Operands, Spec, directions, reverses, split_weights

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
        and not (call.packed or call.lengths or call.reset)
    )


def forward(spec: Spec, operands: Operands) -> list[Tensor] | None:
    """One layer: [output, *final states, *what `backward` needs, as `kept_like` has it]; or None,
    where torch.lstm would not take oneDNN, or oneDNN has no kernel for such tensors."""
    switches = torch.backends.mkldnn
    if not (switches.is_available() and torch._C._get_mkldnn_enabled() and operands.input.numel()):
        return None
    with torch.autocast("cpu", enabled=False):
        found = aten.if_possible(lambda: _forward(spec, _computed(spec, operands)))
    if found is None:
        return None
    h, c = aten.output_dtypes(spec, operands.input, operands.state, Masks())
    return [*(t.to(dtype) for t, dtype in zip(found, (h, h, c), strict=False)), *found[3:]]


def _forward(spec: Spec, operands: Operands) -> list[Tensor]:
    x = _time_first(spec, operands.input)
    outputs, finals, kept = [], [], []
    # Without gradients oneDNN keeps nothing.
    with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad():
        for d, reverse in enumerate(reverses(spec)):
            given = (x, *_weights(spec, operands, d), *(s[d] for s in operands.state))
            options = (reverse, [], LSTM, spec.hidden_size, 1, spec.bias, False, False, True)
            output, h_n, c_n, workspace = torch.ops.aten.mkldnn_rnn_layer(*given, *options)
            outputs.append(output)
            finals.append((h_n, c_n))
            kept += [c_n, workspace.as_strided((1,), (1,))]
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    final = [torch.stack(states) for states in zip(*finals, strict=True)]
    return [_time_first(spec, output), *final, *kept]


def kept_like(spec: Spec, operands: Operands) -> list[Tensor]:
    """Empty tensors like those that `forward` keeps for `backward`."""
    input, (_, c) = operands.input, operands.state
    like = [(c.shape[1:], _dtype(spec, input)), ((1,), torch.uint8)] * directions(spec)
    return [c.new_empty(shape, dtype=dtype) for shape, dtype in like]


def has_workspace(kept: list[Tensor]) -> bool:
    """Whether the workspace is still there: a copy of what was kept has its first byte alone.

    It holds four gates, of two bytes or more each, for every number in c_n, and that in each step.
    """
    pairs = zip(kept[::2], kept[1::2], strict=True)
    return all([byte.untyped_storage().nbytes() > max(1, 8 * c_n.numel()) for c_n, byte in pairs])


def backward(
    spec: Spec, d_outputs: list[Tensor], operands: Operands, output: Tensor, kept: list[Tensor]
) -> list[Tensor]:
    """The gradients of `operands.flat()`, from those of the output and of the final states."""
    originals, operands = operands.flat(), _computed(spec, operands)
    D, x = directions(spec), _time_first(spec, operands.input)
    output, d_output, d_h, d_c = (t.to(x.dtype) for t in (output, *d_outputs))
    d_inputs, d_states, d_weights = [], [], []
    with torch._C._AutoDispatchBelowAutograd():
        steps, d_steps = (_time_first(spec, t).chunk(D, -1) for t in (output, d_output))
        for d, reverse in enumerate(reverses(spec)):
            c_n, byte = kept[2 * d : 2 * d + 2]
            own = steps[d].contiguous()
            given = (x, *_weights(spec, operands, d), *(s[d] for s in operands.state))
            results = (own, own[0 if reverse else -1], c_n)
            gradients = (d_steps[d].contiguous(), d_h[d].contiguous(), d_c[d].contiguous())
            options = (reverse, LSTM, spec.hidden_size, 1, spec.bias, True, False, [], False)
            workspace = byte.as_strided((byte.untyped_storage().nbytes(),), (1,))
            d_x, d_ih, d_hh, d_bias, _, *d_state = torch.ops.aten.mkldnn_rnn_layer_backward(
                *given, *results, *gradients, *options, workspace
            )
            d_inputs.append(d_x)
            d_states.append(d_state)
            d_weights += [d_ih, d_hh] + [d_bias, d_bias.clone()] * spec.bias
    d_input = d_inputs[0] if D == 1 else d_inputs[0] + d_inputs[1]
    both = [torch.stack(states) for states in zip(*d_states, strict=True)]
    # oneDNN's are float32, whatever it computed in.
    gradients = (_time_first(spec, d_input), *both, *d_weights)
    return [d.to(t.dtype) for d, t in zip(gradients, originals, strict=True)]


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


def _time_first(spec: Spec, sequence: Tensor) -> Tensor:
    """Contiguous [T, B, *], from [B, T, *] with batch_first; and the way back."""
    return (sequence.transpose(0, 1) if spec.batch_first else sequence).contiguous()


def _weights(spec: Spec, operands: Operands, d: int) -> list[Tensor]:
    """W_ih, W_hh and the biases of direction d, which oneDNN wants even if there are none."""
    w_ih, w_hh, b_ih, b_hh, *_ = split_weights(spec, operands.weights)[d]
    b_ih, b_hh = (w_ih.new_zeros(w_ih.shape[0]) if b is None else b for b in (b_ih, b_hh))
    return [w.contiguous() for w in (w_ih, w_hh, b_ih, b_hh)]

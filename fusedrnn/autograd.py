"""One layer as one node: the custom ops that every backend shares, and their autograd.

`fusedrnn::layer` and `fusedrnn::layer_backward` are opaque to torch.compile and torch.export.
`Layer`, the autograd.Function around them, adds what an op cannot: a backward that is itself
differentiable.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrnn import cells, onnx, packing, reference
from fusedrnn.dispatch import fp32_precision
from fusedrnn.reference import Weights, split_weights


class Config(NamedTuple):
    """Everything about a layer that is not a tensor."""

    cell: str
    bias: bool
    bidirectional: bool
    projection: bool
    batch_first: bool
    backend: str
    save: str  # what backward may read: "gates", or "states" (the gates are recomputed)
    autocast: str  # the dtype that autocast gives the aten backend, or ""
    clip: float = 0.0  # bound of the gradient of each h_t inside the loop; 0 for none


class Sequence(NamedTuple):
    """Tensors without a gradient: which time steps exist, where sequences begin, and the noise.

    Where sequences begin with a state other than 0, it stands behind the initial state.
    """

    lengths: Tensor | None  # [B], for padded input
    batch_sizes: Tensor | None  # [T] on the CPU, for packed input
    reset: Tensor | None  # [T, B] bool, or [B, T] with batch_first
    h_mask: Tensor | None = None  # [D, B, H], multiplies h_{t-1} before the recurrent product
    zoneout: Tensor | None = None  # bool [*rows, D, S, H]: keep the state; or [S] floats


def run_reference(
    config: Config,
    input: Tensor,
    state: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    sequence: Sequence,
    record: list[list[tuple[Tensor, ...]]] | None = None,
    given: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """A layer in differentiable torch operators: (output, *final states). `record`, and `given`
    in the layout of the output, as `reference.layer` takes them."""
    cell = cells.get(config.cell)
    directions = split_weights(cell, weights, bias=config.bias, projection=config.projection)
    lengths, batch_sizes, reset, h_mask, zoneout = sequence
    noise = None if zoneout is None or zoneout.dim() == 1 else zoneout
    input = by_time(config, input, sequence)
    given = None if given is None else by_time(config, given, sequence)
    zoneout = zoneout if noise is None else by_time(config, noise, sequence)
    if batch_sizes is not None:
        lengths = packing.lengths_of(batch_sizes).to(input.device)
    elif config.batch_first and reset is not None:
        reset = reset.transpose(0, 1)
    lengths = None if lengths is None else lengths.to(input.device)
    output, final = reference.layer(
        cell, input, state, directions, lengths=lengths, reset=reset, h_mask=h_mask,
        zoneout=zoneout, clip=config.clip, record=record, given=given,
    )  # fmt: skip
    if batch_sizes is not None:
        output = packing.unpad(output, batch_sizes)
    elif config.batch_first:
        output = output.transpose(0, 1)
    return output, *final


def by_time(config: Config, tensor: Tensor, sequence: Sequence) -> Tensor:
    """[T, B, *] from a layer's layout: [T, B, *], [B, T, *] or packed [N, *]."""
    if sequence.batch_sizes is not None:
        return packing.pad(tensor, sequence.batch_sizes)
    return tensor.transpose(0, 1) if config.batch_first else tensor


def run_aten(
    config: Config,
    input: Tensor,
    state: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    sequence: Sequence,
    *,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[Tensor, ...]:
    """A stack of layers through torch's own operator: (output, *final states)."""
    function = getattr(torch, str(cells.get(config.cell).aten))
    hx = state[0] if len(state) == 1 else tuple(state)
    options = (config.bias, num_layers, dropout, training, config.bidirectional)
    if sequence.batch_sizes is not None:
        return function(input, sequence.batch_sizes, hx, list(weights), *options)
    # On the meta device there is no length to look at; the shapes are those of full rows.
    if sequence.lengths is None or input.device.type == "meta":
        return function(input, hx, list(weights), *options, config.batch_first)
    return _run_aten_padded(function, config, input, state, weights, sequence.lengths, options)


def _run_aten_padded(function, config, input, state, weights, lengths, options):
    """torch packs only rows of at least one step, longest first, with lengths on the CPU: so
    rows are sorted, and empty ones keep their state and get an output of zeros."""
    batch_dim = 0 if config.batch_first else 1
    T = input.shape[1 - batch_dim]
    sorted_lengths, order = lengths.cpu().clamp(0, T).sort(descending=True, stable=True)
    filled = int((sorted_lengths > 0).sum())
    if filled == 0:
        D = 2 if config.bidirectional else 1
        zeros = input.new_zeros([*input.shape[:2], D * state[0].shape[-1]])
        # A function of everything, as autograd sees it, so that backward goes through; and a
        # multiple of the state, not a clone, whose gradient would be an op's very argument.
        never = torch.zeros((), dtype=torch.bool, device=input.device)
        everything = torch.stack([t.sum() for t in (input, *weights)]).sum()
        return torch.where(never, everything, zeros), *(1 * s for s in state)
    order = order.to(input.device)
    rows = order[:filled]
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        input.index_select(batch_dim, rows), sorted_lengths[:filled], config.batch_first
    )
    first = tuple(s.index_select(1, rows) for s in state)
    hx = first[0] if len(first) == 1 else first
    data, *final = function(packed.data, packed.batch_sizes, hx, list(weights), *options)
    # Each packed row to its place in [T * B]; pad_packed_sequence copies in place, which loses
    # the gradient under a dispatch mode (a FLOP counter, say), where autograd runs inside an op.
    sizes = packed.batch_sizes
    step = torch.repeat_interleave(torch.arange(sizes.numel(), device=sizes.device), sizes)
    rank = torch.arange(step.numel(), device=sizes.device) - packing.offsets_of(sizes)[step]
    row = rows.cpu()[rank]
    place = row * T + step if config.batch_first else step * lengths.numel() + row
    output = data.new_zeros([T * lengths.numel(), data.shape[-1]])
    output = output.index_copy(0, place.to(input.device), data).view(*input.shape[:2], -1)
    kept = tuple(s.to(f.dtype) for s, f in zip(state, final, strict=True))
    final = (k.index_copy(1, rows, f) for k, f in zip(kept, final, strict=True))
    return output, *final


def run_plain(config: Config, *args: Any) -> tuple[Tensor, ...]:
    """The layer by the backend whose operators autograd sees through: aten or reference."""
    run = run_aten if config.backend == "aten" else run_reference
    if not config.autocast:
        return run(config, *args)
    dtype = getattr(torch, config.autocast)
    with torch.autocast(args[0].device.type, dtype=dtype):
        return run(config, *args)


def _input_gates(input_ni: Tensor, directions: list[Weights], G: int) -> Tensor:
    """x_gates [N, D, G, H]: the input projection of all time steps and both directions."""
    N, D, rows = input_ni.shape[0], len(directions), directions[0].w_ih.shape[0]
    if D == 1:
        x_gates = F.linear(input_ni, directions[0].w_ih, directions[0].b_ih)
        return x_gates.view(N, 1, G, -1)
    x_gates = input_ni.new_empty(N, D, rows)
    for d, w in enumerate(directions):
        if w.b_ih is None:
            torch.mm(input_ni, w.w_ih.T, out=x_gates[:, d])
        else:
            torch.addmm(w.b_ih, input_ni, w.w_ih.T, out=x_gates[:, d])
    return x_gates.view(N, D, G, -1)


def _recurrent_gates(h_prev_ndh: Tensor, directions: list[Weights], G: int) -> Tensor:
    """h_gates [N, D, G, H] of all time steps at once, from the h before each of them."""
    gates = [F.linear(h_prev_ndh[:, d], w.w_hh, w.b_hh) for d, w in enumerate(directions)]
    return torch.stack(gates, dim=1).unflatten(-1, (G, -1))


def _state_ops(config, state, sequence: Sequence, rows: packing.Rows, N: int):
    """Resets, masks and zoneout as the kernels take them; the states that resets set stand behind
    the S initial ones."""
    import fusedrnn.kernels as kernels

    S, D = len(cells.get(config.cell).states), 2 if config.bidirectional else 1
    reset, zoneout = sequence.reset, sequence.zoneout
    if reset is not None:
        reset = packing.starts_by_row(reset, rows, config.batch_first, D)
    if zoneout is not None and zoneout.dim() > 1:
        zoneout = zoneout.reshape(N, D, S, -1).view(torch.int8)
    reset_state = tuple(s.contiguous() for s in state[S:])
    return kernels.StateOps(reset, reset_state, sequence.h_mask, zoneout, config.clip or None)


def _triton_forward(config, input, state, weights, sequence) -> list[Tensor]:
    import fusedrnn.kernels as kernels

    cell = cells.get(config.cell)
    directions = split_weights(cell, weights, bias=config.bias, projection=False)
    rows = packing.rows_of(input, config.batch_first, sequence.lengths, sequence.batch_sizes)
    precision = fp32_precision()
    with matmul_precision(input, precision):
        x_gates = _input_gates(input.reshape(-1, input.shape[-1]), directions, len(cell.gates))
    output, final, saved, states = kernels.scan_forward(
        cell,
        x_gates,
        directions,
        state[: len(cell.states)],
        rows=rows,
        save=config.save or None,
        input_precision=precision,
        state_ops=_state_ops(config, state, sequence, rows, x_gates.shape[0]),
    )
    kept = [t for t in (saved, states) if t is not None]
    return [output.view(*input.shape[:-1], -1), *final, *kept]


def _triton_backward(
    config, d_outputs, input, state, weights, output, saved, sequence, *, d_input_wanted
) -> list[Tensor]:
    import fusedrnn.kernels as kernels

    cell = cells.get(config.cell)
    G, D, H = len(cell.gates), 2 if config.bidirectional else 1, state[0].shape[-1]
    directions = split_weights(cell, weights, bias=config.bias, projection=False)
    rows = packing.rows_of(input, config.batch_first, sequence.lengths, sequence.batch_sizes)
    precision = fp32_precision()
    input_ni = input.reshape(-1, input.shape[-1])
    output_ndh = output.reshape(-1, D, H)
    ops = _state_ops(config, state, sequence, rows, input_ni.shape[0])
    h_prev = packing.previous_h(output_ndh, state[0], rows)
    if ops.reset is not None:
        h_prev = packing.started_over(h_prev, ops.reset, ops.reset_state[:1], rows)
    if ops.h_mask is not None:
        h_prev *= packing.by_row(ops.h_mask, rows, h_prev.shape[0])
    if sequence.lengths is not None:
        # The gradients of steps that do not exist are 0, but 0 * inf is NaN in the products.
        over = packing.rows_over(rows, sequence.lengths.to(input.device))
        input_ni = input_ni.masked_fill(over[:, None], 0)
        h_prev.masked_fill_(over[:, None, None], 0)
    state = state[: len(cell.states)]
    saved, values = list(saved), None
    with matmul_precision(input, precision):
        if config.save == "gates":
            values = saved.pop(0) if cell.saved else None
        elif cell.saved or ops.zoneout is not None:
            values = (
                _input_gates(input_ni, directions, G),
                _recurrent_gates(h_prev, directions, G),
            )
        states = saved.pop(0) if len(cell.states) > 1 else None
        dx_gates, dh_gates, d_state, d_params = kernels.scan_backward(
            cell,
            d_outputs[0].reshape(-1, D, H),
            tuple(d_outputs[1:]),
            directions,
            state,
            output_ndh,
            states,
            values,
            rows=rows,
            save=config.save,
            input_precision=precision,
            state_ops=ops,
        )
        d_input = input.new_empty([0])
        if d_input_wanted:
            d_input = dx_gates[:, 0].flatten(1) @ directions[0].w_ih
            for d, w in enumerate(directions[1:], 1):
                d_input.addmm_(dx_gates[:, d].flatten(1), w.w_ih)
            d_input = d_input.view(input.shape)
        gradients: list[Tensor] = []
        for d, w in enumerate(directions):
            dx, dh = dx_gates[:, d].flatten(1), dh_gates[:, d].flatten(1)
            gradients += [dx.T @ input_ni, dh.T @ h_prev[:, d]]
            if config.bias:
                # Summed in float32: N is large, and a low-precision sum would stop growing.
                d_b_ih = dx.sum(0, dtype=torch.float32).to(dx.dtype)
                d_b_hh = d_b_ih if cell.additive else dh.sum(0, dtype=torch.float32).to(dh.dtype)
                gradients += [d_b_ih, d_b_hh.clone()]
            gradients += [
                p[d].to(q.dtype, copy=True) for p, q in zip(d_params, w.params, strict=True)
            ]
    return [d_input, *d_state, *gradients]


@contextmanager
def matmul_precision(input: Tensor, precision: str) -> Iterator[None]:
    """Runs the matrix products beside the loop in the precision of the loop, as cuDNN does."""
    if input.device.type != "cuda" or input.dtype != torch.float32:
        yield
        return
    settings = torch.backends.cuda.matmul
    with _matmul_switch:
        before = settings.fp32_precision
        settings.fp32_precision = precision
        try:
            yield
        finally:
            settings.fp32_precision = before


# The switch is the process's: a thread (DataParallel has one per device) must not find, and later
# restore, what another had set for its own products. Held while they are launched, not while run.
_matmul_switch = threading.Lock()


@torch.library.custom_op("fusedrnn::layer", mutates_args=())
def layer_op(
    input: Tensor,
    state: list[Tensor],
    weights: list[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    cell: str,
    bias: bool,
    bidirectional: bool,
    projection: bool,
    batch_first: bool,
    backend: str,
    save: str,
    autocast: str,
    clip: float = 0.0,
    h_mask: Tensor | None = None,
    zoneout: Tensor | None = None,
) -> list[Tensor]:
    """One layer: [output, *final states, *what the backend saves for `layer_backward`].

    `input` is [T, B, I], [B, T, I] or packed [N, I]; `state` S tensors [D, B, H], and S more if
    `reset` sets another state than 0; `save` "" if there will be no backward.
    """
    config = Config(
        cell, bias, bidirectional, projection, batch_first, backend, save, autocast, clip
    )  # fmt: skip
    sequence = Sequence(lengths, batch_sizes, reset, h_mask, zoneout)
    if batch_sizes is not None:
        packing.check_batch_sizes(batch_sizes, input)
    # Here, since a compiler looks at no values; on another device it would mean waiting.
    if lengths is not None and lengths.device.type == "cpu":
        packing.check_length_values(lengths, input.shape[1 if batch_first else 0])
    if backend == "triton":
        return _triton_forward(config, input, tuple(state), tuple(weights), sequence)
    outputs = run_plain(config, input, tuple(state), tuple(weights), sequence)
    return [output.contiguous() for output in outputs]


@layer_op.register_fake
def _(
    input, state, weights, lengths, batch_sizes, reset, cell, bias, bidirectional, projection,
    batch_first, backend, save, autocast, clip=0.0, h_mask=None, zoneout=None,
):  # fmt: skip
    if onnx.plain_export():
        # Every way of torch.onnx.export to our operator leads here; its own error names nobody.
        lacking = onnx.lacks(cell, projection, batch_sizes, reset, h_mask, zoneout)
        raise NotImplementedError(lacking or onnx.USE_EXPORT)
    D = 2 if bidirectional else 1
    state = state[: len(cells.get(cell).states)]
    wide = state[0].shape[-1]
    dtypes = _output_dtypes(cell, input, state, projection, lengths, batch_sizes, autocast)
    outputs = [input.new_empty([*input.shape[:-1], D * wide], dtype=dtypes[0])]
    outputs += [s.new_empty(s.shape, dtype=d) for s, d in zip(state, dtypes, strict=True)]
    if backend == "triton" and save:
        rows = input.numel() // input.shape[-1]
        kind = cells.get(cell)
        H = state[-1].shape[-1]
        if save == "gates" and kind.saved:
            outputs.append(input.new_empty([rows, D, len(kind.saved), H]))
        if len(kind.states) > 1:
            outputs.append(input.new_empty([rows, D, len(kind.states) - 1, H]))
    return outputs


def _output_dtypes(cell, input, state, projection, lengths, batch_sizes, autocast):
    """The dtypes of the final states (the output has that of h) that torch's operators give.

    Without autocast, the input's. With it, oneDNN's LSTM and the plain RNN compute in the low
    precision; other loops mix it with the state, and so keep a wider state's dtype.
    """
    if not autocast:
        return [input.dtype] * len(state)
    low = getattr(torch, autocast)
    mixed = [torch.promote_types(low, s.dtype) for s in state]
    if cell == "gru":
        return mixed
    if cell == "lstm" and (projection or lengths is not None or batch_sizes is not None):
        return [low if projection else mixed[1], mixed[1]]
    return [low] * len(state)


@torch.library.custom_op("fusedrnn::layer_backward", mutates_args=())
def layer_backward_op(
    d_outputs: list[Tensor],
    input: Tensor,
    state: list[Tensor],
    weights: list[Tensor],
    output: Tensor,
    saved: list[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    cell: str,
    bias: bool,
    bidirectional: bool,
    projection: bool,
    batch_first: bool,
    backend: str,
    save: str,
    autocast: str,
    clip: float,
    d_input_wanted: bool,
    h_mask: Tensor | None = None,
    zoneout: Tensor | None = None,
) -> list[Tensor]:
    """[d_input, *d_state, *d_weights] from `d_outputs`, the gradients of output and states.

    The triton backend leaves `d_input` empty where it is not wanted: that is one large matrix
    product in the first layer of most models.
    """
    config = Config(
        cell, bias, bidirectional, projection, batch_first, backend, save, autocast, clip
    )  # fmt: skip
    sequence = Sequence(lengths, batch_sizes, reset, h_mask, zoneout)
    if backend == "triton":
        return _triton_backward(
            config, d_outputs, input, tuple(state), tuple(weights), output, saved, sequence,
            d_input_wanted=d_input_wanted,
        )  # fmt: skip
    return _recompute_backward(config, d_outputs, input, state, weights, sequence)


@layer_backward_op.register_fake
def _(
    d_outputs, input, state, weights, output, saved, lengths, batch_sizes, reset, cell, bias,
    bidirectional, projection, batch_first, backend, save, autocast, clip, d_input_wanted,
    h_mask=None, zoneout=None,
):  # fmt: skip
    if backend == "triton" and not d_input_wanted:
        input = input.new_empty([0])
    return [t.new_empty(t.shape) for t in (input, *state, *weights)]


@contextmanager
def autograd_inside_op() -> Iterator[None]:
    """Lets autograd record inside a custom op, whose body runs below the autograd keys."""
    key = torch._C.DispatchKey.AutogradFunctionality
    excluded = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded)


def _recompute_backward(config, d_outputs, input, state, weights, sequence) -> list[Tensor]:
    """Runs the layer again under autograd; an op cannot carry an autograd graph across."""
    leaves = [t.detach().requires_grad_() for t in (input, *state, *weights)]
    S = len(state)
    with autograd_inside_op():
        outputs = run_plain(
            config, leaves[0], tuple(leaves[1 : 1 + S]), tuple(leaves[1 + S :]), sequence
        )
    gradients = torch.autograd.grad(
        outputs, leaves, [d.to(o.dtype) for d, o in zip(d_outputs, outputs, strict=True)],
        materialize_grads=True,
    )  # fmt: skip
    return [g.contiguous() for g in gradients]


class Layer(torch.autograd.Function):
    """One layer through the custom ops; differentiable twice through the reference."""

    @staticmethod
    def forward(
        ctx: Any, config: Config, n_state: int, return_states: bool, lengths: Tensor | None,
        batch_sizes: Tensor | None, reset: Tensor | None, h_mask: Tensor | None,
        zoneout: Tensor | None, input: Tensor, *tensors: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        state, weights = tensors[:n_state], tensors[n_state:]
        # torch keeps the next line in an exported program, and shows it where loading fails.
        outputs = torch.ops.fusedrnn.layer(  # `import fusedrnn` registers this operator
            input, state, weights, lengths, batch_sizes, reset, *config,
            h_mask=h_mask, zoneout=zoneout,
        )  # fmt: skip
        S = len(cells.get(config.cell).states)
        output, final, saved = outputs[0], outputs[1 : 1 + S], outputs[1 + S :]
        sequence = (lengths, batch_sizes, reset, h_mask, zoneout)
        ctx.save_for_backward(*sequence, input, *tensors, output, *saved)
        ctx.config, ctx.n_state, ctx.n_weights = config, n_state, len(weights)
        if not return_states:
            return output, *final
        ctx.mark_non_differentiable(saved[-1])  # the states but h: see `with_states`
        return output, *final, saved[-1]

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        S = len(cells.get(ctx.config.cell).states)
        d_outputs = d_outputs[: 1 + S]
        lengths, batch_sizes, reset, h_mask, zoneout, input, *rest = ctx.saved_tensors
        n_state, config = ctx.n_state, ctx.config
        state, weights = rest[:n_state], rest[n_state : n_state + ctx.n_weights]
        output, *saved = rest[n_state + ctx.n_weights :]
        input_wanted = ctx.needs_input_grad[8]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gradients = differentiable_backward(
                config, d_outputs, input, state, weights,
                Sequence(lengths, batch_sizes, reset, h_mask, zoneout),
            )  # fmt: skip
        else:
            gradients = torch.ops.fusedrnn.layer_backward(
                d_outputs, input, state, weights, output, saved, lengths, batch_sizes, reset,
                *config, input_wanted, h_mask=h_mask, zoneout=zoneout,
            )  # fmt: skip
            if not input_wanted:
                gradients = [None, *gradients[1:]]
        return *(None,) * 8, *gradients


def differentiable_backward(
    config: Config,
    d_outputs: tuple[Tensor, ...],
    input: Tensor,
    state: list[Tensor],
    weights: list[Tensor],
    sequence: Sequence,
) -> list[Tensor | None]:
    """The gradients of a layer with a graph of their own, by autograd through the reference.

    Each input enters as a view of itself: a tensor that stands in two places (shared weights)
    must receive the gradient of each place once, not the sum twice.
    """
    views = [t.view_as(t) for t in (input, *state, *weights)]
    wanted = [v for v in views if v.requires_grad]
    S = len(state)
    outputs = run_reference(
        config, views[0], tuple(views[1 : 1 + S]), tuple(views[1 + S :]), sequence
    )
    found = iter(
        torch.autograd.grad(outputs, wanted, d_outputs, create_graph=True, materialize_grads=True)
    )
    return [next(found) if v.requires_grad else None for v in views]


class AtenStack(torch.autograd.Function):
    """A stack of layers through cuDNN, whose own backward cannot be differentiated.

    Forward keeps cuDNN's graph for the first derivative; a second derivative starts from
    `again`, the same function in differentiable operators.
    """

    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., Any], again: Callable[..., Any], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
            outputs = run(*inputs)
        ctx.again = again
        # Saved rather than kept, so that autograd frees cuDNN's graph when it frees this node's.
        ctx.save_for_backward(*tensors, *inputs, *outputs)
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        n = len(ctx.needs_input_grad) - 2
        tensors, inputs = ctx.saved_tensors[:n], ctx.saved_tensors[n : 2 * n]
        outputs = ctx.saved_tensors[2 * n :]
        create_graph = torch.is_grad_enabled()
        if create_graph:
            inputs = [t.view_as(t) for t in tensors]
            outputs = ctx.again(*inputs)
        wanted = [t for t in inputs if t.requires_grad]
        found = iter(
            torch.autograd.grad(
                outputs, wanted, d_outputs,
                retain_graph=True, create_graph=create_graph, materialize_grads=True,
            )
        )  # fmt: skip
        return None, None, *(next(found) if t.requires_grad else None for t in inputs)


class StoredStates(torch.autograd.Function):
    """What a kernel stored of the states, with the gradient of `again`, which computes the same
    from `tensors` in differentiable operators."""

    @staticmethod
    def forward(
        ctx: Any, again: Callable[..., Any], n: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.again = again
        ctx.save_for_backward(*tensors[n:])
        return tuple(t.view_as(t) for t in tensors[:n])

    @staticmethod
    def backward(ctx: Any, *d_states: Tensor) -> tuple[Tensor | None, ...]:
        create_graph, n = torch.is_grad_enabled(), len(d_states)
        wanted = ctx.needs_input_grad[2 + n :]
        with torch.enable_grad():
            inputs = [
                t.view_as(t) if create_graph else t.detach().requires_grad_(w)
                for t, w in zip(ctx.saved_tensors, wanted, strict=True)
            ]
            found = torch.autograd.grad(
                ctx.again(*inputs), [t for t, w in zip(inputs, wanted, strict=True) if w], d_states,
                create_graph=create_graph, materialize_grads=True,
            )  # fmt: skip
        found = iter(found)
        return None, None, *(None,) * n, *(next(found) if w else None for w in wanted)


def run_layer(
    config: Config,
    input: Tensor,
    state: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    sequence: Sequence,
) -> tuple[Tensor, ...]:
    """A layer through the custom ops: (output, *final states)."""
    return Layer.apply(config, len(state), False, *sequence, input, *state, *weights)


def with_states(
    run: Callable,
    config: Config,
    input: Tensor,
    state: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    sequence: Sequence,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A layer by `run`: (output, *final states), and each of its S states at all steps,
    [D, T, B, H], which are 0 where a row is over.

    h is the output. The others, the reference computes anyway; the kernels store them, for
    backward; torch's operators return no other, and for these the reference's loop computes them
    again, as it does for a gradient through what the kernels stored.
    """
    S, D = len(cells.get(config.cell).states), 2 if config.bidirectional else 1
    n = len(state)

    def again(output, input, *tensors):
        steps: list = []
        kind = input.device.type
        with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
            run_reference(
                config._replace(clip=0.0), input, tensors[:n], tensors[n:], sequence, steps, output
            )
        return _stack_steps(config, steps, sequence, output.dtype)

    if S == 1:
        outputs, others = run(config, input, state, weights, sequence), ()
    elif run is run_reference:
        steps: list = []
        outputs = run(config, input, state, weights, sequence, steps)
        others = _stack_steps(config, steps, sequence, outputs[0].dtype)
    elif config.backend == "triton":
        *outputs, stored = Layer.apply(config, n, True, *sequence, input, *state, *weights)
        planes = stored.view(*input.shape[:-1], D, S - 1, -1)
        planes = by_time(config, planes, sequence).permute(3, 2, 0, 1, 4).unbind()
        given = (outputs[0], input, *state, *weights)
        others = StoredStates.apply(again, S - 1, *planes, *given)
    else:
        outputs = run(config, input, state, weights, sequence)
        others = again(outputs[0], input, *state, *weights)
    h = by_time(config, outputs[0], sequence).unflatten(-1, (D, -1)).permute(2, 0, 1, 3)
    return tuple(outputs), (h, *others)


def _stack_steps(config: Config, steps: list, sequence: Sequence, dtype) -> tuple[Tensor, ...]:
    """The states but h, each [D, T, B, H], from what `reference.layer` recorded."""
    planes = [
        torch.stack([torch.stack([step[s] for step in direction]) for direction in steps])
        for s in range(1, len(steps[0][0]))
    ]
    lengths = sequence.lengths
    if sequence.batch_sizes is not None:
        lengths = packing.lengths_of(sequence.batch_sizes)
    if lengths is not None:
        lengths = lengths.to(planes[0].device)
        active = reference.active_rows(lengths, planes[0].shape[1])[:, :, None]
        planes = [torch.where(active, p, torch.zeros_like(p)) for p in planes]
    return tuple(p.to(dtype) for p in planes)

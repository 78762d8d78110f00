"""A stack of layers as one node of the graph: the custom ops, and their autograd.

`fusedrnn::stack` and `fusedrnn::stack_backward` are opaque to torch.compile and torch.export.
`Stack`, the autograd.Function around them, adds what an op cannot: a backward that is itself
differentiable.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fusedrnn import cells, onnx, packing
from fusedrnn.backends import aten, loop, onednn, reference, triton
from fusedrnn.call import (
    Call,
    Masks,
    Operands,
    Spec,
    directions,
    in_turn,
    joined,
    masks_of,
    operands_of,
    widths,
)

# An op's arguments are plain: the fields of a Spec stand at the end of its schema, one by one.
_TYPES = {str: "str", int: "SymInt", bool: "bool", float: "float", str | None: "str?"}
_TYPES[tuple[int, ...] | None] = "SymInt[]?"  # None: layers of several sizes are several ops
_SPEC = ", ".join(f"{_TYPES[t]} {name}" for name, t in Spec.__annotations__.items())


def run_plain(spec: Spec, operands: Operands, masks: Masks) -> tuple[Tensor, ...]:
    """The stack by the backend whose operators autograd sees through: aten or reference."""
    run = aten.forward if spec.backend == "aten" else reference.forward
    if not spec.autocast:
        return run(spec, operands, masks)
    with torch.autocast(operands.input.device.type, dtype=getattr(torch, spec.autocast)):
        return run(spec, operands, masks)


def _forward(operands: list[Tensor], masks: list[Tensor | None], *fields: Any) -> list[Tensor]:
    """[output, *final states, *what is kept for `stack_backward`]."""
    spec = Spec(*fields)
    call, rest = operands_of(spec, operands), masks_of(masks)
    if rest.batch_sizes is not None:
        packing.check_batch_sizes(rest.batch_sizes, call.input)
    # Here, since a compiler looks at no values; on another device it would mean waiting.
    if rest.lengths is not None and rest.lengths.device.type == "cpu":
        packing.check_length_values(rest.lengths, call.input.shape[1 if spec.batch_first else 0])
    if spec.backend == "triton":
        return triton.forward(spec, call, rest)
    if spec.backend == "loop":
        return loop.forward(spec, call, rest)
    keeps = spec.save == "workspace"
    if keeps and (found := onednn.forward(spec, call, rest)) is not None:
        return found
    outputs = [output.contiguous() for output in run_plain(spec, call, rest)]
    return outputs + onednn.kept_like(spec, call) if keeps else outputs


def _backward(d_outputs: list[Tensor], operands: list[Tensor], *rest: Any) -> list[Tensor]:
    """The gradients of `operands`, of which some backends leave some empty, see theirs.

    In the dtypes of the forward pass, whatever autocast there is around the backward pass.
    """
    with torch.autocast(operands[0].device.type, enabled=False):
        return _gradients(d_outputs, operands, *rest)


def _gradients(
    d_outputs: list[Tensor],
    operands: list[Tensor],
    masks: list[Tensor | None],
    output: Tensor,
    kept: list[Tensor],
    d_input_wanted: bool,
    *fields: Any,
) -> list[Tensor]:
    spec = Spec(*fields)
    if spec.backend == "triton":
        return triton.backward(
            spec, d_outputs, operands_of(spec, operands), masks_of(masks), output, kept,
            d_input_wanted=d_input_wanted,
        )  # fmt: skip
    if spec.backend == "loop":
        given = (spec, d_outputs, operands_of(spec, operands), masks_of(masks), kept)
        return loop.backward(*given, d_input_wanted=d_input_wanted)
    if spec.save == "workspace" and onednn.has_workspace(kept):
        call = (operands_of(spec, operands), masks_of(masks))
        return onednn.backward(spec, d_outputs, *call, output, kept)
    # An op cannot carry an autograd graph across, so the call runs again, under autograd.
    leaves = [t.detach().requires_grad_() for t in operands]
    with autograd_inside_op():
        outputs = run_plain(spec, operands_of(spec, leaves), masks_of(masks))
    gradients = torch.autograd.grad(
        outputs, leaves, [d.to(o.dtype) for d, o in zip(d_outputs, outputs, strict=True)],
        materialize_grads=True,
    )  # fmt: skip
    # Outputs of an op may not share memory, as the gradients do of two biases that are added, or of
    # matrices that are multiplied as one.
    first: dict[int, int] = {}
    owners = [first.setdefault(g.untyped_storage()._cdata, i) for i, g in enumerate(gradients)]
    return [
        g.contiguous() if owner == i else g.clone(memory_format=torch.contiguous_format)
        for i, (g, owner) in enumerate(zip(gradients, owners, strict=True))
    ]


stack_op: Any = torch.library.custom_op(
    "fusedrnn::stack", _forward, mutates_args=(),
    schema=f"(Tensor[] operands, Tensor?[] masks, {_SPEC}) -> Tensor[]",
)  # fmt: skip
stack_backward_op: Any = torch.library.custom_op(
    "fusedrnn::stack_backward", _backward, mutates_args=(),
    schema="(Tensor[] d_outputs, Tensor[] operands, Tensor?[] masks, Tensor output, "
    f"Tensor[] kept, bool d_input_wanted, {_SPEC}) -> Tensor[]",
)  # fmt: skip


@stack_op.register_fake
def _(operands, masks, *fields):
    spec, rest = Spec(*fields), masks_of(masks)
    if onnx.plain_export():
        # Every way of torch.onnx.export to our operator leads here; its own error names nobody.
        raise NotImplementedError(onnx.lacks(spec, rest) or onnx.USE_EXPORT)
    input, state, *_ = operands_of(spec, operands)
    dtypes = aten.output_dtypes(spec, input, state, rest)
    features = directions(spec) * widths(spec)[0]
    outputs = [input.new_empty([*input.shape[:-1], features], dtype=dtypes[0])]
    outputs += [s.new_empty(s.shape, dtype=d) for s, d in zip(state, dtypes, strict=True)]
    if spec.backend == "triton":
        kept = triton.kept_shapes(spec, input)
        outputs += [input.new_empty(shape) for layer in kept for shape in layer]
    if spec.backend == "loop":
        outputs += loop.kept_like(spec, operands_of(spec, operands))
    if spec.save == "workspace":
        outputs += onednn.kept_like(spec, operands_of(spec, operands))
    return outputs


@stack_backward_op.register_fake
def _(d_outputs, operands, masks, output, kept, d_input_wanted, *fields):
    spec, empty = Spec(*fields), 0
    if spec.backend == "triton":
        weights = len(operands_of(spec, operands).weights)
        above = weights * (spec.num_layers - spec.trained_from) // spec.num_layers
        empty = len(operands) - above if spec.trained_from else int(not d_input_wanted)
    if spec.backend == "loop":
        empty = int(not d_input_wanted)
    return [t.new_empty([0] if i < empty else t.shape) for i, t in enumerate(operands)]


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


_PLAIN = {Tensor, torch.nn.Parameter}
_functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009, its type stubs do not have it


def watched(operands: Sequence[Tensor]) -> bool:
    """Whether somebody looks at the operators that run: a compiler, an exporter, a dispatch mode,
    a subclass of Tensor. Then the ops must be seen; else their bodies are called, which saves a
    small call the time of the dispatcher."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or not _PLAIN.issuperset(map(type, operands))
    )


def _batched(d_outputs: list[Tensor]) -> bool:
    """Whether these are several gradients at once, as `is_grads_batched` hands them down."""
    return any(map(_functorch.is_legacy_batchedtensor, d_outputs))


class Stack(torch.autograd.Function):
    """A stack of layers through the custom ops; differentiable twice through the reference."""

    @staticmethod
    def forward(
        ctx: Any, spec: Spec, n_masks: int, return_states: bool, *tensors: Any
    ) -> tuple[Tensor, ...]:
        masks, operands = list(tensors[:n_masks]), list(tensors[n_masks:])
        if watched(operands):
            # torch keeps the next line in an exported program, and shows it where loading fails.
            outputs = torch.ops.fusedrnn.stack(  # `import fusedrnn` registers this operator
                operands, masks, *spec
            )
        else:
            outputs = _forward(operands, masks, *spec)
        end = 1 + len(cells.get(spec.cell).states)
        # The output is saved only where backward reads it: elsewhere it may be changed in place.
        read = spec.backend == "triton" or spec.save == "workspace"
        output = outputs[0] if read else outputs[0].new_empty(0)
        ctx.save_for_backward(*tensors, output, *outputs[end:])
        ctx.spec, ctx.n_masks, ctx.n_tensors = spec, n_masks, len(tensors)
        if not return_states:
            return tuple(outputs[:end])
        ctx.mark_non_differentiable(outputs[-1])  # the states but h: see `fusedrnn.states`
        return *outputs[:end], outputs[-1]

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        spec, n_masks = ctx.spec, ctx.n_masks
        saved = list(ctx.saved_tensors)
        masks, operands = saved[:n_masks], saved[n_masks : ctx.n_tensors]
        output, *kept = saved[ctx.n_tensors :]
        given = list(d_outputs[: 1 + len(cells.get(spec.cell).states)])
        input_wanted = ctx.needs_input_grad[3 + n_masks]
        gradients: list[Tensor | None]
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or _batched(given)):
            gradients = differentiable_backward(spec, given, operands, masks_of(masks))
        else:
            run: Any = torch.ops.fusedrnn.stack_backward if watched(operands) else _backward
            gradients = run(given, operands, masks, output, kept, input_wanted, *spec)
            wanted = ctx.needs_input_grad[3 + n_masks :]
            gradients = [g if w else None for g, w in zip(gradients, wanted, strict=True)]
        return *(None,) * (3 + n_masks), *gradients


def differentiable_backward(
    spec: Spec, d_outputs: list[Tensor], operands: list[Tensor], masks: Masks
) -> list[Tensor | None]:
    """The gradients of a stack by autograd through the reference, with a graph of their own where
    grad mode is on.

    Each input enters as a view of itself: a tensor that stands in two places (shared weights)
    must receive the gradient of each place once, not the sum twice.
    """
    with torch.enable_grad():
        views = [t.view_as(t) for t in operands]
        wanted = [v for v in views if v.requires_grad]
        outputs = reference.forward(spec, operands_of(spec, views), masks)
    found = iter(
        torch.autograd.grad(
            outputs, wanted, d_outputs,
            create_graph=torch.is_grad_enabled(), materialize_grads=True,
        )
    )  # fmt: skip
    return [next(found) if v.requires_grad else None for v in views]


def run(
    spec: Spec, operands: Operands, masks: Masks, return_states: bool = False
) -> tuple[Tensor, ...]:
    """The stack as one node: (output, *final states), then what `return_states` adds."""
    if spec.save is None and not watched(operands.flat()):  # without a gradient, without a node
        if spec.backend == "triton":
            return tuple(triton.forward(spec, operands, masks))
        if spec.backend == "loop":
            return tuple(loop.forward(spec, operands, masks))
    tensors, flat = masks.flat(), list(operands.flat())
    if not torch.compiler.is_compiling():  # autograd saves no tensor of inference mode
        tensors = [t.clone() if t is not None and t.is_inference() else t for t in tensors]
    else:  # Dynamo refuses a tensor that is given twice
        flat = [
            t.view_as(t) if any([t is other for other in flat[:i]]) else t
            for i, t in enumerate(flat)
        ]
    return Stack.apply(spec, len(tensors), return_states, *tensors, *flat)


def execute(spec: Spec, operands: Operands, masks: Masks, call: Call) -> tuple[Tensor, ...]:
    """The stack by the backend that was chosen: (output, *final states)."""
    compiling = torch.compiler.is_compiling()
    if spec.backend == "aten" and not compiling:
        return aten.forward_on(spec, operands, masks, call)
    plain = not compiling or call.transformed or "states" in call.loop_features
    if spec.backend == "reference" and plain:
        return reference.forward(spec, operands, masks)
    by_layer = spec.backend == "loop" or spec.save == "workspace"
    if spec.hidden_sizes or by_layer:  # a node for each layer
        output, finals = in_turn(spec, operands, masks, run)
        return output, *joined(finals)
    return run(spec, operands, masks)

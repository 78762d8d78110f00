"""What a shape is made concrete as, and everyone who can compute it: fusedrnn's backends, torch.nn,
and other projects.

A `Problem` has weights, several sets of inputs, and the answer in float64. A backend is a function
`build(name, problem, pass_, device) -> Runner`; `Runner.run(i)` computes input set i once. All do
equal work: the input product included, gradients for the input and for every parameter, none of
them accumulated. `refuses(name, shape, device)` says why one is left out.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from bench.shapes import Shape, length_list
from bench.timing import Device
from fusedrnn import Recurrent, cells, dispatch, explain, restore_modules
from fusedrnn.backends import stages
from fusedrnn.call import Call, Spec, split_weights

TORCH_DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16,
    "fp32-tf32": torch.float32, "fp32-exact": torch.float32,
}  # fmt: skip


def set_precision(dtype: str) -> None:
    """tf32 or full float32, for the recurrent kernels and for matrix products alike."""
    precision = "tf32" if dtype == "fp32-tf32" else "ieee"
    torch.backends.cudnn.rnn.fp32_precision = precision
    torch.backends.cuda.matmul.fp32_precision = precision


class Inputs(NamedTuple):
    """One set of inputs of a shape, and the gradients that come back."""

    input: Tensor | PackedSequence  # [T, B, I]; requires grad
    leaf: Tensor  # the tensor inside `input`
    hx: tuple[Tensor, ...] | None
    reset: Tensor | None  # [T, B] bool
    cotangents: tuple[Tensor, ...]  # of output, h_n (and c_n)


class Problem:
    """Everything about a shape that all backends share.

    Args:
        sets: how many sets of inputs to rotate through.
        gradients: whether the answer has them; they cost a backward pass in float64.
    """

    def __init__(
        self, shape: Shape, device: torch.device | str, sets: int = 3, gradients: bool = True
    ):
        self.shape = shape
        self.device = torch.device(device)
        self.dtype = TORCH_DTYPES[shape.dtype]
        self.gradients = gradients
        self.weights = self._draw_weights(torch.Generator().manual_seed(0))
        # Drawn where they are needed: hundreds of millions of numbers take a CPU seconds.
        generator = torch.Generator(self.device).manual_seed(0)
        self.inputs = [self._draw(generator, n) for n in range(sets)]
        self._answer: dict[str, Tensor] | None = None

    def module(self) -> Recurrent:
        """fusedrnn's module for the shape, holding this problem's weights."""
        shape = self.shape
        with torch.random.fork_rng(devices=[]):
            module = Recurrent(
                shape.cell, shape.I, shape.H, shape.layers, bidirectional=shape.bidirectional
            )
        module.load_state_dict(self.weights)
        return module.to(self.device, self.dtype)

    def torch_module(self) -> nn.Module:
        """torch.nn's."""
        module = self.module()
        restore_modules(module)
        return module

    def answer(self) -> dict[str, Tensor]:
        """Set 0 in float64: outputs and final states, and the gradients; computed once.

        torch.nn computes it, which shares nothing with fusedrnn; only resets, which torch.nn
        does not have, come from our reference loop.
        """
        if self._answer is not None:
            return self._answer
        module: nn.Module
        if self.shape.resets:
            module = self.module()
            module.backend = "reference"
        else:
            module = self.torch_module()
        # Weights and inputs as the backends get them: rounding those is not the backend's error.
        module = module.double()
        given = self.inputs[0]
        leaf = given.leaf.detach().double().requires_grad_()
        input = given.input._replace(data=leaf) if isinstance(given.input, PackedSequence) else leaf
        hx = None if given.hx is None else tuple(h.double() for h in given.hx)
        extra = {} if given.reset is None else {"reset": given.reset}
        results = flatten(module(input, as_hx(hx), **extra))
        answer = dict(zip(state_names(self.shape), results, strict=True))
        if self.gradients:
            names = [name for name, _ in module.named_parameters()]
            wanted = [leaf, *module.parameters()]
            cotangents = [c.double() for c in given.cotangents]
            gradients = torch.autograd.grad(results, wanted, cotangents)
            answer |= dict(zip(grad_names(names), gradients, strict=True))
        self._answer = {name: t.detach() for name, t in answer.items()}
        return self._answer

    def _draw_weights(self, generator: torch.Generator) -> dict[str, Tensor]:
        shape = self.shape
        module = Recurrent(
            shape.cell, shape.I, shape.H, shape.layers, bidirectional=shape.bidirectional,
            device="meta",
        )  # fmt: skip
        bound = shape.H**-0.5
        return {
            name: torch.empty(w.shape).uniform_(-bound, bound, generator=generator)
            for name, w in module.state_dict().items()
        }

    def _draw(self, generator: torch.Generator, n: int) -> Inputs:
        shape, device, dtype = self.shape, self.device, self.dtype

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device).to(dtype)

        input: Tensor | PackedSequence
        leaf = normal(shape.T, shape.B, shape.I)
        rows: tuple[int, ...] = (shape.T, shape.B)
        if shape.lengths:
            # The same in every set: a low quantile would be that of the set with the fewest steps.
            lengths = torch.tensor(length_list(shape.lengths, shape.T, shape.B))
            packed = pack_padded_sequence(leaf, lengths)
            leaf = packed.data.clone().requires_grad_()
            input = packed._replace(data=leaf)
            rows = (leaf.shape[0],)
        else:
            input = leaf.requires_grad_()
        D, states = shape.directions, 2 if shape.cell == "lstm" else 1
        state = (shape.layers * D, shape.B, shape.H)
        cotangents = (normal(*rows, D * shape.H), *(normal(*state) for _ in range(states)))
        # One step at a time, a state is carried from call to call.
        hx = tuple(normal(*state) for _ in range(states)) if shape.T == 1 else None
        reset = None
        if shape.resets:  # episodes of about 50 steps
            chance = random.Random(n)
            flags = [[chance.random() < 0.02 for _ in range(shape.B)] for _ in range(shape.T)]
            reset = torch.tensor(flags, device=device)
        return Inputs(input, leaf, hx, reset, cotangents)


def as_hx(states: tuple[Tensor, ...] | None):
    """States as torch.nn's modules take them."""
    return states[0] if states is not None and len(states) == 1 else states


def flatten(result) -> tuple[Tensor, ...]:
    """(output, final state) of a module as a flat tuple of tensors."""
    output, final = result
    data = output.data if isinstance(output, PackedSequence) else output
    return (data, *final) if isinstance(final, tuple) else (data, final)


def state_names(shape: Shape) -> tuple[str, ...]:
    return ("output", "h_n", "c_n") if shape.cell == "lstm" else ("output", "h_n")


def grad_names(parameters: list[str]) -> list[str]:
    return ["d_input", *(f"d_{name}" for name in parameters)]


WHAT = {
    "torch_nn": "torch.nn's module as it is: cuDNN on a GPU, oneDNN or native code on a CPU. On a "
    "GPU torch keeps the weights in one piece for cuDNN, but (torch 2.11) not in bf16",
    "torch_nn_graph": "torch.nn's module, replayed from a CUDA graph",
    "auto": "fusedrnn as installed",
    "triton": 'fusedrnn, backend="triton" (where auto takes another)',
    "triton_states": 'fusedrnn, backend="triton", save="states": less memory',
    "triton_graph": 'fusedrnn, backend="triton", replayed from a CUDA graph',
    "aten": 'fusedrnn, backend="aten"',
    "reference": 'fusedrnn, backend="reference": a loop of torch operators',
    "reference_graph": "the reference loop, replayed from a CUDA graph",
    "reference_compile": "the loop with its step under torch.compile, in a CUDA graph on a GPU",
    "flashrnn": "FlashRNN's fused CUDA kernel, with the input product added",
    "flashrnn_alternating": "FlashRNN's alternating CUDA kernels, with the input product added",
    "haste": "haste",
}
GRAPHED = {"torch_nn_graph": "torch_nn", "triton_graph": "triton", "reference_graph": "reference"}
# A time loop of this many steps or more is not worth capturing or compiling: minutes, gigabytes.
LONGEST_LOOP = 1024


@dataclass
class Runner:
    """`run(i)` computes input set i and returns the tensors that `names` names."""

    run: Callable[[int], tuple[Tensor, ...]]
    names: tuple[str, ...]
    ran_on: str = ""  # the backend that fusedrnn chose
    memory_counts: bool = True  # whether a call allocates what it needs (a graph's replay: no)


def refuses(name: str, shape: Shape, device: Device) -> str | None:
    """Why a backend does not run a shape, or None."""
    if name not in WHAT:
        raise ValueError(f"backend must be one of {sorted(WHAT)}, got {name!r}")
    if name in GRAPHED and not device.has_graphs:
        return "CUDA graphs need a CUDA device"
    if name in GRAPHED and shape.resets and GRAPHED[name] == "torch_nn":
        return "a loop of calls, too long to be of interest"
    if name.startswith("reference_") and (shape.lengths or shape.resets or shape.bidirectional):
        return "the captured loop is measured for padded input in one direction"
    if name.startswith("reference_") and shape.T * shape.layers > LONGEST_LOOP:
        return f"a loop of more than {LONGEST_LOOP} steps takes minutes to capture"
    if name == "aten" or name.startswith("triton"):
        spec = Spec(shape.cell, shape.I, shape.H, shape.layers, bidirectional=shape.bidirectional)
        call = Call(
            spec, device.torch, TORCH_DTYPES[shape.dtype], shape.T, shape.B,
            packed=bool(shape.lengths), reset=shape.resets,
            loop_features=("reset",) if shape.resets else (),
        )  # fmt: skip
        return dispatch.REFUSES["aten" if name == "aten" else "triton"](call)
    return _external_refuses(name, shape, device) if name in EXTERNAL else None


# Package, cells and dtypes of what others have; each is for one plain layer on a GPU.
EXTERNAL = {
    "flashrnn": ("flashrnn", ("lstm", "rnn_tanh"), ("bf16", "fp16")),
    "flashrnn_alternating": ("flashrnn", ("lstm", "gru", "rnn_tanh"), TORCH_DTYPES),
    "haste": ("haste_pytorch", ("lstm", "gru"), ("fp32-tf32", "fp32-exact")),
}


def _external_refuses(name: str, shape: Shape, device: Device) -> str | None:
    package, names, dtypes = EXTERNAL[name]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if device.torch.type != "cuda":
        return f"{package} needs a CUDA device"
    if shape.cell not in names or shape.dtype not in dtypes:
        return f"it is for {', '.join(names)} in {', '.join(dtypes)}"
    if shape.layers > 1 or shape.bidirectional or shape.lengths or shape.resets or shape.T == 1:
        return "one padded layer in one direction, from a zero state, is all it has"
    return None


def build(name: str, problem: Problem, pass_: str, device: Device) -> Runner:
    """The runner of a backend; `pass_` is forward, training or inference."""
    if name in GRAPHED:
        return _graphed(build(GRAPHED[name], problem, pass_, device), problem, device)
    if name == "torch_nn":
        module = problem.torch_module()
        return _runner(Stepwise(module) if problem.shape.resets else module, problem, pass_)
    if name == "reference_compile":
        module = CompiledLoop(problem.module(), problem.shape.cell, device.compiles)
        runner = _runner(module, problem, pass_)
        return _graphed(runner, problem, device) if device.has_graphs else runner
    if name.startswith("flashrnn"):
        fused = "cuda_fused" if name == "flashrnn" else "cuda"
        return _runner(FlashRNN(problem, fused), problem, pass_, named=False)
    if name == "haste":
        return _runner(Haste(problem), problem, pass_, named=False)
    module = problem.module()
    forced, _, option = name.partition("_")
    if forced != "auto":
        module.backend = forced
    if option == "states":
        module.save = "states"
    runner = _runner(module, problem, pass_)
    runner.ran_on = forced
    if forced == "auto":
        given = problem.inputs[0]
        with torch.set_grad_enabled(pass_ != "inference"):
            runner.ran_on = explain(module, given.input, as_hx(given.hx), reset=given.reset).backend
    return runner


def _runner(module: nn.Module, problem: Problem, pass_: str, named: bool = True) -> Runner:
    """`named`: the parameters are those of torch.nn, and their gradients can be compared."""
    module.train(pass_ != "inference")
    parameters = list(module.parameters())
    names = state_names(problem.shape)
    given = [
        (x.input, as_hx(x.hx), {} if x.reset is None else {"reset": x.reset})
        for x in problem.inputs
    ]

    def inference(i: int) -> tuple[Tensor, ...]:
        input, hx, extra = given[i]
        with torch.no_grad():
            return flatten(module(input, hx, **extra))

    def forward(i: int) -> tuple[Tensor, ...]:
        input, hx, extra = given[i]
        return flatten(module(input, hx, **extra))

    wanted = [[x.leaf, *parameters] for x in problem.inputs]

    def training(i: int) -> tuple[Tensor, ...]:
        results = forward(i)
        gradients = torch.autograd.grad(
            results, wanted[i], problem.inputs[i].cotangents, materialize_grads=True
        )
        return *results, *gradients

    if pass_ == "training":
        own = [name for name, _ in module.named_parameters()] if named else []
        names = (*names, *grad_names(own))
    run = {"inference": inference, "forward": forward, "training": training}[pass_]
    return Runner(run, names)


def _graphed(runner: Runner, problem: Problem, device: Device) -> Runner:
    replays = [device.graph(lambda i=i: runner.run(i)) for i in range(len(problem.inputs))]
    return Runner(lambda i: replays[i](), runner.names, runner.ran_on, memory_counts=False)


class Stepwise(nn.Module):
    """What users of torch.nn do where a state must be reset in mid-sequence: a call per step."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.inner = module

    def named_parameters(self, *args, **kwargs):
        return self.inner.named_parameters(*args, **kwargs)

    def forward(self, input, hx=None, *, reset):
        shape = (self.inner.num_layers, input.shape[1], self.inner.hidden_size)
        count = 2 if self.inner.mode == "LSTM" else 1
        states = hx if isinstance(hx, tuple) else (hx,) if hx is not None else None
        states = states or tuple(input.new_zeros(shape) for _ in range(count))
        keep = (~reset).to(input.dtype)[:, None, :, None]
        outputs = []
        for t in range(input.shape[0]):
            states = tuple(s * keep[t] for s in states)
            output, final = self.inner(input[t : t + 1], as_hx(states))
            states = final if isinstance(final, tuple) else (final,)
            outputs.append(output)
        return torch.cat(outputs), as_hx(states)


class CompiledLoop(nn.Module):
    """The reference's loop, its step fused by torch.compile: what one gets without a kernel."""

    def __init__(self, module: nn.Module, cell: str, backend: str):
        super().__init__()
        self.inner = module
        self.cell = cells.get(cell)
        known = self.cell

        def step(x_gates, weights, *state):
            gates = stages.shared_out(known, "gates", x_gates.float().chunk(len(known.gates), -1))
            of_stages = stages.stage_weights(known, weights)
            values = tuple(s.float() for s in state)
            for stage, x, (w, b) in zip(known.stages, gates, of_stages, strict=True):
                received = stages.product(values[0].to(w.dtype), w, b, stage.products)
                values, _ = stage.forward(x, tuple(r.float() for r in received), values, ())
            return (values[0].to(x_gates.dtype), *values[1:])

        torch.compiler.reset()
        self.step = torch.compile(step, backend=backend, dynamic=False)

    def named_parameters(self, *args, **kwargs):
        return self.inner.named_parameters(*args, **kwargs)

    def forward(self, input, hx=None):
        inner, finals = self.inner, []
        flat = [getattr(inner, name) for name in inner._flat_weights_names]
        layers = split_weights(Spec(self.cell.name, inner.input_size, inner.hidden_size), flat)
        for layer, weights in enumerate(layers):
            x_gates = F.linear(input, weights.w_ih, weights.b_ih)
            state = tuple(s[layer] for s in (hx if isinstance(hx, tuple) else (hx,))) if (
                hx is not None
            ) else tuple(
                input.new_zeros(input.shape[1], inner.hidden_size) for _ in self.cell.states
            )  # fmt: skip
            state = (state[0], *(s.float() for s in state[1:]))
            outputs = []
            for t in range(input.shape[0]):
                state = self.step(x_gates[t], weights, *state)
                outputs.append(state[0])
            input = torch.stack(outputs)
            finals.append(tuple(s.to(input.dtype) for s in state))
        return input, as_hx(tuple(torch.stack(parts) for parts in zip(*finals, strict=True)))


class FlashRNN(nn.Module):
    """flashrnn's function as a module with one head, and a linear layer before it.

    Its layouts: Wx [B, T, G, 1, H], R [G, 1, H, H] with rows the new unit, b [G, 1, H]. Its GRU
    keeps the recurrent part of n first: R is n, r, z, the bias is n (recurrent), r, z, n (input).
    """

    FUNCTIONS = {"lstm": "lstm", "gru": "gru", "rnn_tanh": "elman"}  # noqa: RUF012

    def __init__(self, problem: Problem, kernel: str):
        super().__init__()
        shape, w = problem.shape, problem.weights
        self.function, self.kernel = self.FUNCTIONS[shape.cell], kernel
        self.dtype_name = str(problem.dtype).removeprefix("torch.")
        G, H = shape.gates, shape.H
        w_hh = w["weight_hh_l0"].view(G, 1, H, H)
        b_ih, b_hh = w["bias_ih_l0"].view(G, 1, H), w["bias_hh_l0"].view(G, 1, H)
        if shape.cell == "gru":
            w_hh = w_hh[[2, 0, 1]]
            bias = torch.cat([b_hh[2:], b_ih[:2] + b_hh[:2], b_ih[2:]])
        else:
            bias = b_ih + b_hh
        place = {"device": problem.device, "dtype": problem.dtype}
        self.w_ih = nn.Parameter(w["weight_ih_l0"].to(**place))
        self.w_hh = nn.Parameter(w_hh.to(**place))
        self.bias = nn.Parameter(bias.to(**place))

    def forward(self, input, hx=None):
        from flashrnn import flashrnn  # pyright: ignore[reportMissingImports]

        H = self.w_hh.shape[-1]
        x_gates = F.linear(input.transpose(0, 1), self.w_ih).unflatten(-1, (-1, 1, H))
        states, last = flashrnn(
            x_gates, self.w_hh, self.bias, function=self.function, backend=self.kernel,
            dtype=self.dtype_name,
        )  # fmt: skip
        output = states[0, :, :, 0].transpose(0, 1)  # [S, B, T, 1, H] -> [T, B, H]
        final = tuple(s.transpose(0, 1) for s in last[:, :, 0])  # [S, B, 1, 1, H] -> [1, B, H]
        return output, as_hx(final)


class Haste(nn.Module):
    """haste's layer; it takes torch.nn's weights itself, and has no state argument to pass on."""

    def __init__(self, problem: Problem):
        super().__init__()
        import haste_pytorch  # pyright: ignore[reportMissingImports]

        shape, w = problem.shape, problem.weights
        self.layer = getattr(haste_pytorch, shape.cell.upper())(shape.I, shape.H)
        self.layer.to(problem.device)
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        self.layer.from_native_weights(*(w[n].to(problem.device) for n in names))

    def forward(self, input, hx=None):
        return self.layer(input)

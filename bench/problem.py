"""A shape made concrete: weights, several sets of inputs, and the answer in float64."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from bench.shapes import Shape, length_list
from fusedrnn import modules
from fusedrnn.replace import OURS

TORCH_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32-tf32": torch.float32,
    "fp32-exact": torch.float32,
}
CLASSES = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}


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
        shape: what to compute.
        device: where.
        sets: how many sets of inputs to rotate through.
        seed: of weights and inputs.
        gradients: whether the answer has them; they cost a backward pass in float64.
    """

    def __init__(
        self,
        shape: Shape,
        device: torch.device | str,
        sets: int = 3,
        seed: int = 0,
        gradients: bool = True,
    ):
        self.shape = shape
        self.device = torch.device(device)
        self.dtype = TORCH_DTYPES[shape.dtype]
        self.gradients = gradients
        self.weights = self._draw_weights(torch.Generator().manual_seed(seed))
        # Drawn where they are needed: hundreds of millions of numbers take a CPU seconds.
        generator = torch.Generator(self.device).manual_seed(seed)
        self.inputs = [self._draw(generator, n) for n in range(sets)]
        self._answer: dict[str, Tensor] | None = None

    def module(self, classes: dict[str, type], **options) -> nn.Module:
        """An LSTM, GRU or RNN out of `classes`, holding this problem's weights."""
        shape = self.shape
        if shape.cell.startswith("rnn_"):
            options["nonlinearity"] = shape.cell.removeprefix("rnn_")
        with torch.random.fork_rng(devices=[]):
            module = classes[CLASSES[shape.cell]](
                shape.I, shape.H, shape.layers, bidirectional=shape.bidirectional, **options
            )
        module.load_state_dict(self.weights)
        return module.to(self.device, self.dtype)

    def answer(self) -> dict[str, Tensor]:
        """Set 0 in float64: outputs and final states, and the gradients; computed once.

        torch.nn computes it, which shares nothing with fusedrnn; only resets, which torch.nn
        does not have, come from our reference loop.
        """
        if self._answer is not None:
            return self._answer
        kinds = OURS if self.shape.resets else modules.TORCH_CLASSES
        module = self.module(kinds)
        if self.shape.resets:
            module.backend = "reference"
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
        kind = modules.TORCH_CLASSES[CLASSES[shape.cell]]
        module = kind(
            shape.I, shape.H, shape.layers, bidirectional=shape.bidirectional, device="meta"
        )
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

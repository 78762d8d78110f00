"""Records what a step in torch's operators computes, as terms over the vocabulary."""

import ast
import inspect
import linecache
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedrnn.cells import vocabulary
from fusedrnn.cells._terms import BOOL, FORMS, LOGICAL, Term, Terms, Value


def _power(x, exponent):
    if exponent in (0.5, -0.5):
        return torch.sqrt(x) if exponent > 0 else torch.rsqrt(x)
    if exponent not in (2, 3, 4, -1, -2):
        return NotImplemented
    result = x
    for _ in range(abs(int(exponent)) - 1):
        result = result * x
    return result if exponent > 0 else 1 / result


def _clamp(x, low=None, high=None):
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return NotImplemented
    x = x if high is None else torch.where(x > high, high, x)
    return x if low is None else torch.where(x < low, low, x)


def _softplus(x, beta=1, threshold=20):
    # Beyond `threshold` torch rounds to x, 2e-9 less; the vocabulary does not.
    return NotImplemented if beta == 1 else torch.nn.functional.softplus(x * beta) / beta


def _gelu(x, *, approximate="none"):
    if approximate != "tanh":
        return NotImplemented
    return 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x)))


def _elu(x, alpha=1, scale=1, input_scale=1):
    # Of min(x, 0): a gradient of 0 times exp(x) = inf would be NaN. exp(x) - 1 would cancel.
    below = torch.where(x > 0, 0.0, x) * input_scale
    expm1 = (torch.exp(below) + 1) * torch.tanh(below / 2)
    return torch.where(x > 0, x * scale, expm1 * (alpha * scale))


def _hard(x, low=-1, high=1):
    return torch.where(x <= low, low, torch.where(x >= high, high, x))


# The other operators, in those. What a comparison decides is written so that NaN comes through.
_COMPOSED: dict[str, Callable[..., Any]] = {
    "rsub": lambda x, y, alpha=1: torch.add(-x * alpha, y),
    "reciprocal": lambda x: torch.div(torch.ones_like(x), x),
    "minimum": lambda x, y: -torch.maximum(-x, -y),
    "sgn": lambda x: torch.where(x > 0, 1.0, torch.where(x < 0, -1.0, 0.0)),
    "sign": lambda x: torch.where(x > 0, 1.0, torch.where(x < 0, -1.0, 0.0)),
    "clamp": _clamp,
    "clamp_min": lambda x, low: _clamp(x, low),
    "clamp_max": lambda x, high: _clamp(x, None, high),
    "pow": _power,
    "exp2": lambda x: torch.exp(x * math.log(2)),
    "isnan": lambda x: x != x,
    "lerp": lambda x, y, weight: x + weight * (y - x),
    "addcmul": lambda x, y, z, *, value=1: x + y * z * value,
    "addcdiv": lambda x, y, z, *, value=1: x + y / z * value,
    "masked_fill": lambda x, mask, value: torch.where(mask, value, x),
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": _gelu,
    "elu": _elu,
    "mish": lambda x: x * torch.tanh(torch.nn.functional.softplus(x)),
    "leaky_relu": lambda x, slope=0.01: torch.where(x > 0, x, x * slope),
    "hardtanh": _hard,
    "hardsigmoid": lambda x: _hard(x / 6 + 0.5, 0, 1),
    "hardswish": lambda x: x * _hard(x / 6 + 0.5, 0, 1),
    "softplus": _softplus,
    "log_sigmoid_forward": lambda x: (-torch.nn.functional.softplus(-x), x),
    # Of what autograd calls.
    "sigmoid_backward": lambda d, y: d * y * (1 - y),
    "tanh_backward": lambda d, y: d * (1 - y * y),
    "threshold_backward": lambda d, y, threshold: torch.where(y <= threshold, 0.0, d),
    "softplus_backward": lambda d, x, beta, threshold: d * torch.sigmoid(x),
}


class Recorder(TorchDispatchMode):
    """Records as terms what torch dispatches. `step`: the user's, whose lines errors name."""

    def __init__(self, terms: Terms, cell: str, step: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.terms, self.cell, self.step = terms, cell, step
        self.known: dict[int, tuple[Tensor, Value]] = {}  # the tensor too: it keeps its id taken
        self.names = _assigned_names(step) if step else {}
        self.named: dict[str, Term] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler to keep it out of here: two seconds

    def tensors(self, terms: Sequence[Term], *, grad: bool = False) -> tuple[Tensor, ...]:
        """Tensors that stand for those terms."""
        made = tuple(
            torch.full((1, 1), 0.5, dtype=torch.float32, device="cpu").requires_grad_(grad)
            for _ in terms
        )
        self.known.update((id(m), (m, t)) for m, t in zip(made, terms, strict=True))
        return made

    def term(self, value: Any) -> Value:
        """What a tensor stands for; or a number."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.known:
            raise self.error(
                "reads a tensor that is none of its arguments; only numbers may come from outside"
            )
        return self.known[id(value)][1]

    def error(self, text: str) -> ValueError:
        """With the line of the innermost frame that is neither torch's nor ours."""
        frame: Any = sys._getframe(1)
        foreign = ("torch", "fusedrnn", "contextlib")
        while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in foreign:
            frame = frame.f_back
        file, line = frame.f_code.co_filename, frame.f_lineno
        at = f"{file}:{line}: `{linecache.getline(file, line).strip()}`: " if self.step else ""
        return ValueError(f"cell {self.cell!r}: {at}{text}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operator = func.overloadpacket.__name__
        base = operator.rstrip("_")  # sigmoid of sigmoid_, which writes into its argument
        with self:
            made = _COMPOSED[base](*args, **kwargs) if base in _COMPOSED else NotImplemented
        if isinstance(made, tuple):
            return made
        if made is NotImplemented:
            value = self.recorded(func, base, args, kwargs)
            made = func(*args, **kwargs)
        else:
            value = self.term(made)
        if base != operator:
            made = args[0]
        self.known[id(made)] = made, value
        if isinstance(value, Term) and value.form and self.step:
            self.give_name(value)
        return made

    def recorded(self, func: Any, base: str, args: tuple, kwargs: dict[str, Any]) -> Value:
        """The term of an operator."""
        if base in ("zeros_like", "ones_like"):
            return float(base == "ones_like")
        if base in ("scalar_tensor", "full_like"):
            return args[-1]
        if base == "clone":
            return self.term(args[0])
        if base == "detach" and not (self.step and isinstance(self.term(args[0]), Term)):
            return self.term(args[0])  # by torch, of what it keeps; the user's would end a gradient
        if base == "_local_scalar_dense":
            raise self.error("asks for the value of a tensor (if, float, math); use torch.where")
        form = FORMS.get(base)
        count = form.count("{}") if form else 0
        alpha = args[count] if len(args) > count else kwargs.get("alpha", 1)
        if form is None or len(args) < count or not set(kwargs) <= {"alpha"}:
            raise self.error(
                f"{func} is not among what a step may use: arithmetic, comparisons, "
                f"{sorted(vocabulary.NAMES)}, and what torch has made of these; each unit is "
                "computed for itself"
            )
        found = [self.term(a) for a in args[:count]]
        bools = [isinstance(t, Term) and t.form in BOOL for t in found]
        if bools != [base in LOGICAL or (base == "where" and k == 0) for k in range(count)]:
            raise self.error(f"{func} mixes numbers and results of comparisons; use torch.where")
        if base in ("add", "sub") and alpha != 1:
            found[1] = self.terms(FORMS["mul"], found[1], alpha)
        return self.terms(form, *found)

    def give_name(self, term: Term) -> None:
        """The last term that an assignment of the step makes has the name that is assigned."""
        frame: Any = sys._getframe(2)
        code = getattr(self.step, "__code__", None)
        while frame and frame.f_code is not code:
            frame = frame.f_back
        name = self.names.get(frame.f_lineno) if frame else None
        if name and not term.name:
            if name in self.named:
                self.named[name].name = ""
            term.name, self.named[name] = name, term


def _assigned_names(step: Callable[..., Any]) -> dict[int, str]:
    """The name that each line of a function assigns, by its number in the file."""
    try:
        lines, first = inspect.getsourcelines(step)
    except (OSError, TypeError):
        return {}
    return {
        line + first - 1: node.targets[0].id
        for node in ast.walk(ast.parse(textwrap.dedent("".join(lines))))
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }

"""A cell from its step alone, written with torch's operators: the backward is derived.

    @fusedrnn.cell(gates=("u", "n"), states=("h",))
    def ugrnn(x, hidden, state, params):
        u = torch.sigmoid(x.u + hidden.u)
        n = torch.tanh(x.n + hidden.n)
        return u * state.h + (1 - u) * n

The step runs once, and every operator that torch dispatches is recorded as a term over the
vocabulary of the cells. That gives the text of the forward body. The text runs again under
autograd, and what torch dispatches then gives the text of the backward body.

What the forward keeps for the backward is a minimum vertex cut between the two, as in torch's
min_cut_rematerialization_partition: as few values as can be. The states before and after a step
and the parameters cost nothing there, as they are stored anyway.
"""

import hashlib
import inspect
import linecache
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedrnn.cells import vocabulary
from fusedrnn.cells._cell import REGISTRY, Cell, Linear, Own, Stage, register
from fusedrnn.cells._recorder import Recorder
from fusedrnn.cells._terms import BOOL, GRADIENT, Term, Terms, minimum_cut, reached, write

_TEXTS: dict[str, str] = {}  # of the bodies, by the cell's name


def cell(
    *,
    gates: Sequence[str] | Sequence[Sequence[str]],
    states: Sequence[str],
    params: Sequence[str] = (),
) -> Callable[[Callable[..., Any]], Cell]:
    """Makes a cell of the function of one step, and registers it under the function's name.

        @fusedrnn.cell(gates=("u", "n"), states=("h",))
        def ugrnn(x, hidden, state, params):
            u = torch.sigmoid(x.u + hidden.u)
            n = torch.tanh(x.n + hidden.n)
            return u * state.h + (1 - u) * n

        rnn = fusedrnn.Recurrent(ugrnn, 64, 128)

    The function computes each unit for itself, from four named tuples of tensors: `x` and `hidden`
    have the gates (W_ih x_t + b_ih and W_hh h_{t-1} + b_hh), `state` the states before the step,
    `params` the cell's own vectors. It returns the new states: a tensor, or a tuple in the order of
    `states`. It runs once, here; so its Python `if` must not ask for the values of tensors.

    A gate whose product has to wait for others belongs to a further stage. The function is a
    generator then, which yields what the next stage multiplies in the place of h_{t-1}, and is sent
    that stage's part of `hidden`:

        @fusedrnn.cell(gates=(("r", "z"), ("n",)), states=("h",))
        def reset_before(x, hidden, state, params):
            r = torch.sigmoid(x.r + hidden.r)
            z = torch.sigmoid(x.z + hidden.z)
            hidden = yield r * state.h
            n = torch.tanh(x.n + hidden.n)
            return (1 - z) * n + z * state.h

    The bodies that were derived can be read: inspect.getsource(ugrnn.stages[0].backward). In
    float16 and bfloat16 they begin with what was kept, rounded, as the written ones do; but an
    exponential makes an error of 0.01 in what it is taken of one of 1 %.

    Args:
        gates: names of the gates, in the order in which the weights stack them; or a tuple of such
            tuples, one for each of 2 to 6 stages.
        states: names of the states, the first of which is "h", the output.
        params: names of vectors [H] of the cell's own, each read by one stage.
    Returns:
        A decorator, which returns the cell: the same one again for the same equations.
    Raises:
        TypeError: gates, states or params is one string.
        AttributeError: the function asks for a gate, state or parameter that there is not.
        ValueError: the function uses an operator that the kernels lack, or a tensor's value, or
            does not return one tensor for each state; or the name stands for another cell.
    """
    for argument, names in (("gates", gates), ("states", states), ("params", params)):
        if isinstance(names, str):
            raise TypeError(f"{argument}: expected a tuple of names, got {names!r}")
    stages: Any = [gates] if all(isinstance(gate, str) for gate in gates) else gates

    def decorate(step: Callable[..., Any]) -> Cell:
        made, text = derive(step, [tuple(s) for s in stages], tuple(states), tuple(params))
        text = f"{made.gates} {made.states} {made.params}\n{text}"
        if made.name in REGISTRY and _TEXTS.get(made.name) == text:
            return REGISTRY[made.name]
        if made.name in REGISTRY:
            # Modules find their cell by its name: those of the old one would compute the new one.
            raise ValueError(
                f"cell {made.name!r} is registered already, with other equations; modules may be "
                "in use that know it by that name: give this one another"
            )
        _TEXTS[made.name] = text
        return register(made)

    return decorate


@dataclass(eq=False)
class _Part:
    """A stage while it is derived: the terms of the tuples that its bodies take and return."""

    gates: tuple[str, ...]
    x: list[Term]
    received: list[Term]
    params: list[Term] = field(default_factory=list)
    values: list[Term] = field(default_factory=list)
    results: list[Term] = field(default_factory=list)
    saved: list[Term] = field(default_factory=list)
    d_results: list[Term] = field(default_factory=list)
    gradients: list[list[Term]] = field(default_factory=list)  # of x, received, values, params

    def given(self) -> dict[str, list[Term]]:
        """What the forward body takes."""
        tuples = {"x_gates": self.x, "received": self.received, "values": self.values}
        return {**tuples, "params": self.params}


def derive(
    step: Callable[..., Any], gates: Sequence[tuple[str, ...]], states: tuple[str, ...],
    params: tuple[str, ...],
) -> tuple[Cell, str]:  # fmt: skip
    """The cell of a step, not registered, and the text of its bodies. Args, raises: see `cell`."""
    name, terms = step.__name__, Terms()
    parts = [
        _Part(g, [terms.leaf(f"x_{k}", s) for k in g], [terms.leaf(f"h_{k}", s) for k in g])
        for s, g in enumerate(gates)
    ]
    prev = [terms.leaf(f"{state}_prev", 0) for state in states]
    own = [terms.leaf(param, -1) for param in params]
    multiplied, new = _record(step, terms, parts, states, prev, own)
    _share_out(name, parts, multiplied, prev, own, new)

    forwards, backwards = [], []
    kept: list[Term] = []
    ends = [f"_{s + 1}" for s in range(len(parts))] if len(parts) > 1 else [""]
    for part, end in zip(parts, ends, strict=True):
        header = f"_forward{end}(x_gates, received, values, params)"
        plain, _ = write(header, part.given(), [part.results, []])
        _differentiate(name, terms, part, _functions(name, [plain])[0])
        backward = reached([t for group in part.gradients for t in group], [])
        readers = [t for t in backward if t.stage == GRADIENT]
        needed = {t for reader in readers for t in reader.terms if t.stage < GRADIENT}
        inputs = [*part.x, *part.received, *part.values]
        part.saved = minimum_cut(needed, inputs, [*prev, *new, *part.params, *kept])
        kept += part.saved
        forwards.append(write(header, part.given(), [part.results, part.saved])[0])

    read = {prev[0]} & {t for part in parts for t in reached(part.results, [])}
    for part, end in zip(parts, ends, strict=True):
        sources = {"d_values": part.d_results, "prev": prev, "new": new}
        sources |= {"params": part.params, "saved": kept}
        text, taken = write(
            f"_backward{end}(d_values, saved, prev, new, params)", sources, part.gradients
        )
        backwards.append(text)
        read |= taken
    bodies = _functions(name, [*forwards, *backwards])
    made = tuple(
        Stage(
            Linear(part.gates),
            bodies[s],
            bodies[len(parts) + s],
            additive=part.gradients[0] == part.gradients[1],
            saved=tuple(t.name or f"value_{k}" for k, t in enumerate(part.saved)),
            own=tuple(Own(p.name) for p in part.params),
        )
        for s, part in enumerate(parts)
    )
    # What later stages multiply has not the features of a projected h.
    projects = len(parts) == 1 and read.isdisjoint((prev[0], new[0]))
    source = f"{step.__module__}.{step.__qualname__}"
    whole = Cell(name, states, made, projects=projects, source=source)
    return whole, "\n".join(forwards + backwards)


def _record(
    step: Callable[..., Any], terms: Terms, parts: list[_Part], states: tuple[str, ...],
    prev: list[Term], own: list[Term],
) -> tuple[list[Term], list[Term]]:  # fmt: skip
    """What the later stages multiply, and the new states, as the user's step computes them."""
    name = step.__name__
    recorder = Recorder(terms, name, step)

    def group(kind: str, names: Sequence[str], leaves: list[Term]) -> Any:
        def unknown(self, asked):
            raise AttributeError(f"cell {name!r}: {kind} has {tuple(names)}, not {asked!r}")

        named = type(kind, (namedtuple(kind, names),), {"__slots__": (), "__getattr__": unknown})
        return named(*recorder.tensors(leaves))

    x = group("x", [g for p in parts for g in p.gates], [t for p in parts for t in p.x])
    hidden = [group("hidden", p.gates, p.received) for p in parts]
    state = group("state", states, prev)
    params = group("params", [p.name for p in own], own)
    found: list[Any] = []
    with recorder:
        result = step(x, hidden[0], state, params)
        if inspect.isgenerator(result):
            try:
                found.append(next(result))
                while len(found) < len(parts):
                    found.append(result.send(hidden[len(found)]))
            except StopIteration as stop:
                result = stop.value
    if len(found) != len(parts) - 1:
        raise ValueError(
            f"cell {name!r}: expected {len(parts) - 1} yields, one before each stage after "
            f"the first, got {len(found)}"
        )
    new = list(result) if isinstance(result, tuple | list) else [result]
    if len(new) != len(states):
        raise ValueError(f"cell {name!r}: expected the new {states}, got {len(new)} values")

    def computed(value: Any) -> Term:
        term = recorder.term(value) if isinstance(value, Tensor) else None
        if term is None or (isinstance(term, Term) and term.form in BOOL):
            raise ValueError(f"cell {name!r}: expected tensors of numbers, got {value!r}")
        return terms.tile(term)

    for state_name, value in zip(states, new, strict=True):
        term = computed(value)
        term.name = term.name or state_name
    return [computed(value) for value in found], [computed(value) for value in new]


def _share_out(
    name: str, parts: list[_Part], multiplied: list[Term], prev: list[Term], own: list[Term],
    new: list[Term],
) -> None:  # fmt: skip
    """What each stage hands to the next, and which reads a parameter."""
    values = prev
    for s, part in enumerate(parts):
        part.values, part.results = values, new
        if s < len(multiplied):
            if multiplied[s].stage > s:
                raise ValueError(f"cell {name!r}: yield {s + 1} reads gates of a later stage")
            ahead = [*multiplied[s + 1 :], *new]
            later = [t for t in reached(ahead, []) if t.stage > s]
            wanted = [*ahead, *(a for t in later for a in t.terms)]
            for term in wanted:
                if term.form in BOOL:  # compared again there: only numbers are handed on
                    wanted += term.terms
            handed = {t for t in wanted if 0 <= t.stage <= s and t.form not in BOOL}
            others = sorted(handed - {multiplied[s]}, key=lambda t: t.index)
            part.results = values = [multiplied[s], *others]
    for param in own:
        readers = [part for part in parts if param in reached(part.results, part.values)]
        if len(readers) > 1:
            raise ValueError(
                f"cell {name!r}: expected one stage to read the parameter {param.name!r}, got "
                f"{len(readers)}"
            )
        (readers or parts)[0].params.append(param)


def _differentiate(name: str, terms: Terms, part: _Part, forward: Callable[..., Any]) -> None:
    """Finds the gradients of all that the stage's forward body takes, by autograd."""
    recorder = Recorder(terms, name)
    tuples = [recorder.tensors(given, grad=True) for given in part.given().values()]
    part.d_results = [terms.leaf(f"d_{t.name or 'value'}", GRADIENT) for t in part.results]
    d_results = recorder.tensors(part.d_results)
    terms.factors = True
    with torch.enable_grad(), recorder:
        results, _ = forward(*tuples)
        pairs = [p for p in zip(results, d_results, strict=True) if p[0].requires_grad]
        inputs = [t for tensors in tuples for t in tensors]
        found = torch.autograd.grad(
            [r for r, _ in pairs], inputs, [d for _, d in pairs], allow_unused=True
        )
    terms.factors = False
    gradients = [terms.tile(0.0 if g is None else recorder.term(g)) for g in found]
    for tensors in tuples:
        part.gradients.append(gradients[: len(tensors)])
        gradients = gradients[len(tensors) :]
    for group in part.gradients[:2]:
        for gate, gradient in zip(part.gates, group, strict=True):
            if gradient.form and not gradient.name:
                gradient.name = f"d_{gate}"


def _functions(name: str, texts: Sequence[str]) -> list[Callable[..., Any]]:
    """The functions of those texts, whose source `inspect`, and so Triton, finds."""
    text = "\n\n\n".join(texts) + "\n"
    file = f"<fusedrnn.cell {name} {hashlib.sha256(text.encode()).hexdigest()[:12]}>"
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    names = {n: getattr(vocabulary, n) for n in vocabulary.NAMES}
    given = {**names, "__name__": __name__}
    exec(compile(text, file, "exec"), given)
    return [f for n, f in given.items() if n not in names and inspect.isfunction(f)]

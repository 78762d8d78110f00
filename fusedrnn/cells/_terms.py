"""What is derived of a cell, as terms over the vocabulary, and the bodies that compute them."""

import ast
import keyword
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import torch

from fusedrnn.cells import vocabulary

UNARY = ("sigmoid", "tanh", "relu", "exp", "log", "log1p", "softplus", "sqrt", "rsqrt", "abs")
COMPARISONS = {"lt": "{} < {}", "le": "{} <= {}", "gt": "{} > {}", "ge": "{} >= {}"}
COMPARISONS |= {"eq": "{} == {}", "ne": "{} != {}"}
LOGICAL = {"bitwise_and": "{} & {}", "bitwise_or": "{} | {}", "bitwise_not": "~{}"}
LOGICAL |= {"logical_and": "{} & {}", "logical_or": "{} | {}", "logical_not": "~{}"}
# An operator of torch, by its name in torch.ops.aten, as a body writes it.
FORMS = {
    **{"add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "div": "{} / {}", "neg": "-{}"},
    **{"where": "where({}, {}, {})", "maximum": "maximum({}, {})"},
    **COMPARISONS,
    **LOGICAL,
    **{name: f"{name}({{}})" for name in UNARY},
}
BOOL = {*COMPARISONS.values(), *LOGICAL.values()}
ZEROS = "zeros_like({})"  # of whatever tile is at hand
GRADIENT = 9  # the stage of what depends on a gradient


class Term:
    """A value of a body: an expression over other terms and numbers. What a body is given has none.

    Attributes:
        index: terms are numbered as they are made, so a term's arguments come before it.
        stage: the first that can compute it; -1 of what depends on parameters alone, or GRADIENT.
        name: what the bodies call it, or "".
    """

    def __init__(self, form: str, args: tuple, index: int, stage: int, name: str = "") -> None:
        self.form, self.args, self.index, self.stage, self.name = form, args, index, stage, name

    @property
    def terms(self) -> list["Term"]:
        """The arguments that are no numbers."""
        return [a for a in self.args if isinstance(a, Term)]


Value = Term | float


class Terms:
    """Makes terms, each once, and simplifies them.

    Attributes:
        factors: whether a * b + a * c becomes a * (b + c). Not in the user's own step, which would
            round otherwise than it is written.
    """

    def __init__(self) -> None:
        self.factors = False
        self._made: dict[tuple, Term] = {}

    def leaf(self, name: str, stage: int) -> Term:
        """A term that bodies are given."""
        return self._keep(("leaf", len(self._made)), "", (), stage, name)

    def __call__(self, form: str, *args: Value) -> Value:
        """The term of that form over `args`; a number, where all of them are."""
        if not any(isinstance(a, Term) for a in args):
            known = {**vars(vocabulary), "inf": math.inf, "nan": math.nan, "torch": torch}
            tensors = (f"torch.tensor({a}, dtype=torch.float64)" for a in args)
            return eval(form.format(*tensors), known).item()
        if form == FORMS["maximum"]:  # torch's takes no number, and its `where` not two
            args = self.tile(args[0]), self.tile(args[1])
        elif form == FORMS["where"] and not any(isinstance(a, Term) for a in args[1:]):
            args = *args[:2], self.tile(args[2])
        key = (form, *(id(a) if isinstance(a, Term) else (a,) for a in args))
        if key in self._made:
            return self._made[key]
        simpler = self._simpler(form, *args)
        if simpler is not None:
            return simpler
        return self._keep(key, form, args, max(a.stage for a in args if isinstance(a, Term)))

    def tile(self, value: Value) -> Term:
        """`value`, as a tile where it is a number or depends on parameters alone."""
        if isinstance(value, Term) and value.stage >= 0:
            return value
        zeros = self._keep((ZEROS,), ZEROS, (), -1)
        if value == 0:
            return zeros
        key = ("tile", id(value) if isinstance(value, Term) else value)
        return self._keep(key, FORMS["add"], (zeros, value), 0)

    def _keep(self, key: tuple, form: str, args: tuple, stage: int, name: str = "") -> Term:
        return self._made.setdefault(key, Term(form, args, len(self._made), stage, name))

    def _simpler(self, form: str, x: Value, y: Value = 0.0, *_: Value) -> Value | None:
        """The same with fewer operators, or None."""
        plus, minus, times, negative = (FORMS[name] for name in ("add", "sub", "mul", "neg"))
        minus_x, minus_y = (
            t.args[0] if isinstance(t, Term) and t.form == negative else None for t in (x, y)
        )
        if form == times and 0 in (x, y):
            return 0.0
        if form == times and 1 in (x, y):
            return y if x == 1 else x
        if form == times and (minus_x or minus_y):
            product = self(times, minus_x or x, minus_y or y)
            return product if minus_x and minus_y else self(negative, product)
        if form == FORMS["div"] and y == 1:
            return x
        if form == negative:
            return minus_x
        if form == plus and 0 in (x, y):
            return y if x == 0 else x
        if form == plus and minus_y:
            return self(minus, x, minus_y)
        if form == plus and minus_x:
            return self(minus, y, minus_x)
        if form == minus and 0 in (x, y):
            return x if y == 0 else self(negative, y)
        if form == minus and minus_y:
            return self(plus, x, minus_y)
        return self._factored(form, x, y) if self.factors and form in (plus, minus) else None

    def _factored(self, form: str, x: Value, y: Value) -> Value | None:
        """a * b + a * c as a * (b + c), and a + a * c as a * (1 + c)."""

        def ways(t: Value) -> list[tuple[Value, Value]]:
            product = isinstance(t, Term) and t.form == FORMS["mul"]
            return [t.args, t.args[::-1]] if product else [(t, 1.0)]  # type: ignore[union-attr]

        for a, b in ways(x):
            for again, c in ways(y):
                if a is again and isinstance(a, Term):
                    return self(FORMS["mul"], a, self(form, b, c))
        return None


def reached(wanted: Sequence[Value], given: Collection[Term]) -> Counter[Term]:
    """The terms that `wanted` takes where `given` are there, and how often each is read."""
    uses: Counter[Term] = Counter(t for t in wanted if isinstance(t, Term))
    todo = list(uses)
    while todo:
        term = todo.pop()
        for argument in () if term in given else term.terms:
            if argument not in uses:
                todo.append(argument)
            uses[argument] += 1
    return uses


def write(
    header: str, sources: dict[str, list[Term]], results: Sequence[list[Term]]
) -> tuple[str, set[Term]]:
    """The text of a body, and which terms it takes.

    Args:
        header: name and arguments.
        sources: the arguments that the body takes terms from, and the terms of each.
        results: the tuples that it returns; where the first two are alike, they are one.
    """
    given = {t: source for source, terms in reversed(sources.items()) for t in terms}
    alike = len(results) > 2 and results[0] == results[1]
    uses = reached([t for result in results[alike:] for t in result], given)
    like = next(t for terms in sources.values() for t in terms)
    uses[like] += any(t.form == ZEROS for t in uses)
    known: dict[Term, str] = {}
    taken = {*vocabulary.NAMES, *keyword.kwlist, *sources, "d_gates", "_"}

    def call(term: Term) -> str:
        names = (f"{term.name or 't'}{k or ''}" for k in range(len(taken)))
        known[term] = next(name for name in names if name not in taken)
        taken.add(known[term])
        return known[term]

    def text(value: Value) -> str:
        if isinstance(value, Term):
            arguments = value.args or (like,)
            return known.get(value) or f"({value.form.format(*map(text, arguments))})"
        if math.isfinite(value) and value == int(value) and abs(value) < 1e9:
            value = int(value)
        return f"({value!r})".replace("inf", "1e999")

    def tuple_of(parts: Sequence[str]) -> str:
        return "(" + "".join(f"{part}, " for part in parts) + ")"

    lines = []
    for source, terms in sources.items():
        parts = [call(t) if uses[t] and given[t] == source else "_" for t in terms]
        if set(parts) - {"_"}:
            lines.append(f"{tuple_of(parts)} = {source}")
    for term in sorted((t for t in uses if uses[t] and t not in given), key=lambda t: t.index):
        expression = text(term)
        if term.form != ZEROS and (term.name or uses[term] > 1 or len(expression) > 60):
            lines.append(f"{call(term)} = {expression}")
    parts = [tuple_of([text(t) for t in result]) for result in results]
    if alike:
        lines.append(f"d_gates = {parts[0]}")
        parts[:2] = ["d_gates", "d_gates"]
    lines = [f"def {header}:", *lines, f"return {', '.join(parts)}"]
    return ast.unparse(ast.parse("\n    ".join(lines))), {t for t in given if uses[t]}


def minimum_cut(
    needed: Collection[Term], inputs: Collection[Term], free: Collection[Term]
) -> list[Term]:
    """The fewest terms from which, with those that are `free`, all that are `needed` follow.

    Of equally many, the latest: the less is left to compute. What a comparison gave is never
    kept, as it has no place among numbers. By augmenting paths: Edmonds & Karp 1972,
    doi:10.1145/321694.321699, in a graph in which a term is an arc.
    """
    source, sink = object(), object()
    room: dict[tuple, float] = {}  # what more can flow along an arc
    beside: defaultdict[Any, list] = defaultdict(list)

    def arc(a: Any, b: Any, capacity: float = math.inf) -> None:
        room[a, b], room[b, a] = capacity, 0
        beside[a].append(b)
        beside[b].append(a)

    terms = [t for t in reached(list(needed), [*inputs, *free]) if t not in free]
    for term in terms:
        arc((term, "in"), (term, "out"), math.inf if term.form in BOOL else 2**20 - term.index)
        if term in needed:
            arc((term, "out"), sink)
        if term in inputs:
            arc(source, (term, "in"))
            continue
        for argument in set(term.terms):
            arc((argument, "out"), (term, "in"))
    while True:
        came_from: dict[Any, Any] = {source: None}
        queue = [source]
        for node in queue:
            ahead = [n for n in beside[node] if room[node, n] and n not in came_from]
            came_from.update(dict.fromkeys(ahead, node))
            queue += ahead
        if sink not in came_from:
            cut = [t for t in terms if (t, "in") in came_from and (t, "out") not in came_from]
            return sorted(cut, key=lambda t: t.index)
        path, node = [], sink
        while node is not source:
            path.append((came_from[node], node))
            node = came_from[node]
        flow = min(room[a, b] for a, b in path)
        for a, b in path:
            room[a, b] -= flow
            room[b, a] += flow

"""What a recurrent cell is, and the registry of all that exist."""

import ast
import dis
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from fusedrnn.cells import vocabulary
from fusedrnn.cells.vocabulary import zeros_like

REGISTRY: dict[str, "Cell"] = {}
_PROJECTED: dict[str, "Cell"] = {}  # those that can be, with their h projected
_FAMILIES: dict[str, Callable[..., "Cell"]] = {}  # what makes the cells that have options
_VARIANTS: dict[str, "Cell"] = {}  # those with other options than the registered one's


@dataclass(frozen=True)
class Linear:
    """The product of values[0] with the rows of weight_hh that belong to `gates`, plus their part
    of bias_hh.

    Attributes:
        diagonal: weight_hh is a vector, [G * H], and a unit sees nothing but itself.
        width: units of each gate; by default H.
    """

    gates: tuple[str, ...]
    diagonal: bool = False
    width: int | None = None


@dataclass(frozen=True)
class Dense:
    """The products of values[0] with matrices of the stage's own, in which the input has no part.

    Attributes:
        weights: names of parameters [units, K], where K is what the stage before has of units.
        biases: names of theirs, [units], of a module with biases; or ().
        width: units of each sum; by default H.
    """

    weights: tuple[str, ...]
    biases: tuple[str, ...] = ()
    width: int | None = None


@dataclass(frozen=True)
class Projection:
    """The product of values[0] with weight_hr, [P, H]: one sum, of P units."""


@dataclass(frozen=True)
class Mean:
    """The means of values[0], ..., values[count - 1] over all units of a head."""

    count: int = 1


class Own(NamedTuple):
    """A parameter that only this cell has.

    Attributes:
        name: the layer's suffix follows it. vectors: it is [vectors * H], and the bodies read so
            many, of one value a unit. start: where all of it starts; None: as the weights do.
    """

    name: str
    vectors: int = 1
    start: float | None = None


class InputNorm(NamedTuple):
    """Layer normalisation of W_ih x over all gates of a direction: x_gates is what comes of it,
    times the parameter `name`, [G * H], plus both biases.

    Attributes:
        name: starts as ones. eps: is added to the variance.
    """

    name: str
    eps: float


@dataclass(frozen=True, eq=False)
class Stage:
    """What the units of a row compute between two exchanges, each for itself.

        received = values[0] @ W^T + b                    W and b as `receives` says, or a mean
        values, saved_s = forward(x_gates, received, values, params)

    `values` are the states before the step where the first stage begins, and where the last one
    ends those after it; in between they are whatever the next stage is to read, values[0] being
    what it multiplies, or the first of them what it takes the means of.

    Both bodies are pointwise in the hidden index: they see tuples of tiles (float32, or
    float64 where the input is) whose elements belong to the same units, so a kernel may call
    them on any tile. They use only the names of `fusedrnn.cells.vocabulary`, and numbers of the
    function around them.

    forward(x_gates, received, values, params) -> new_values, saved_s
    backward(d_new_values, saved, prev, new, params) -> dx_gates, d_received, d_values, d_params

    In `backward`, `saved` are the saved values of all stages, `prev` and `new` the states before
    and after the whole step. `d_values[0]` holds only what reaches values[0] by the pointwise
    path; the time loop adds `d_received @ W`. Of a mean, d_received is the unit's own part, and the
    loop adds the mean of all units' to each.

    Attributes:
        receives: a Linear; or a Dense, a Projection or a Mean, which have no gates of the input.
        saved: names of the values that `forward` keeps for the backward bodies.
        own: the parameters of its own, whose vectors the bodies read as `params`.
        additive: whether the body reads the gates only as the sums x_gates[k] + received[k].
            Then dx_gates and d_received are equal, and are stored once.
    """

    receives: Linear | Dense | Projection | Mean
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    additive: bool
    saved: tuple[str, ...] = ()
    own: tuple[Own, ...] = ()

    def __post_init__(self) -> None:
        for body in (self.forward, self.backward):
            check_body(body)

    @property
    def gates(self) -> tuple[str, ...]:
        """Names of the gates that the input has a part in."""
        return self.receives.gates if isinstance(self.receives, Linear) else ()

    @property
    def sums(self) -> tuple[str, ...]:
        """Names of what the hidden units have a part in: the gates, or the matrices of a Dense."""
        return self.receives.weights if isinstance(self.receives, Dense) else self.gates

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the vectors of `own`, one value a unit each."""
        return tuple(
            [own.name if own.vectors == 1 else f"{own.name}[{i}]"
            for own in self.own for i in range(own.vectors)]
        )  # fmt: skip

    @property
    def products(self) -> int:
        """How many sums or means a unit receives."""
        return self.receives.count if isinstance(self.receives, Mean) else len(self.sums) or 1

    @property
    def exchanged(self) -> int:
        """How many of the values before it go round, from values[0] on."""
        return self.products if isinstance(self.receives, Mean) else 1


class Onnx(NamedTuple):
    """The operator of ONNX that computes a cell.

    Attributes:
        operator: its name. gates: the cell's, in the operator's order.
        activations: of one direction, where they are not the operator's own.
        linear_before_reset: the attribute of ONNX's GRU.
    """

    operator: str
    gates: tuple[str, ...]
    activations: tuple[str, ...] = ()
    linear_before_reset: bool = False


@dataclass(frozen=True, eq=False)
class Cell:
    """A recurrence, described once, for every backend: its stages, one after the other.

    Attributes:
        name: key of the registry, also the public name of the functional.
        states: names of the S states; the first is `h`, which the next step's first stage
            multiplies, and which is the output.
        stages: mostly one, the first a Linear. Between two, all units of a row exchange values[0].
        module: the class of this package that runs it, with the argument that chooses it, or "".
        projects: whether the bodies leave h_{t-1} to the products, so that h may be projected.
        input_norm: how W_ih x is normalised, or None.
        aten: the function of torch that computes this cell, or None. onnx: ONNX's operator for it.
        source: where the equations come from.
        gates: names of the G gates of all stages, in the order in which the weights stack them.
        sums: the same, and behind them the matrices of Dense stages.
        widest: units of the widest stage that does not have H of them, or 0.
        saved: names of the K values that all stages keep for backward, besides the states.
        own: the parameters that only this cell has, that of `input_norm` first.
        params: names of the vectors of all stages' own, one value a unit each.
        diagonal: whether weight_hh is a vector.
        weighted: the stages that multiply values[0] with weights. dense: the Dense ones of them.
        additive: whether dx_gates and dh_gates are equal, in every stage, and are all there is.
    """

    name: str
    states: tuple[str, ...]
    stages: tuple[Stage, ...]
    module: str = ""
    projects: bool = False
    input_norm: InputNorm | None = None
    aten: str | None = None
    onnx: Onnx | None = None
    source: str = ""
    # Worked out at once: torch.compile cannot look into a functools.cached_property.
    gates: tuple[str, ...] = field(init=False)
    sums: tuple[str, ...] = field(init=False)
    widest: int = field(init=False)
    saved: tuple[str, ...] = field(init=False)
    own: tuple[Own, ...] = field(init=False)
    params: tuple[str, ...] = field(init=False)
    diagonal: bool = field(init=False)
    weighted: tuple[Stage, ...] = field(init=False)
    dense: tuple[Stage, ...] = field(init=False)
    additive: bool = field(init=False)

    def __post_init__(self) -> None:
        if not self.states or self.states[0] != "h":
            raise ValueError(f"cell {self.name!r}: states must start with 'h', got {self.states}")
        if len(set(self.states)) < len(self.states):
            raise ValueError(f"cell {self.name!r}: states must differ, got {self.states}")
        if not 1 <= len(self.stages) <= 6:  # the ring of a launch deals its slots out to them
            got = len(self.stages)
            raise ValueError(f"cell {self.name!r}: expected 1 to 6 stages, got {got}")
        if not self.stages[0].gates:
            raise ValueError(f"cell {self.name!r}: expected a first stage of Linear gates")

        def over(attribute: str) -> tuple[Any, ...]:
            return tuple(part for stage in self.stages for part in getattr(stage, attribute))

        derived: dict[str, Any] = {
            name: over(name) for name in ("gates", "sums", "saved", "own", "params")
        }
        if derived["sums"][: len(derived["gates"])] != derived["gates"]:
            raise ValueError(f"cell {self.name!r}: expected Linear stages before Dense ones")
        if self.input_norm is not None:
            scale = Own(self.input_norm.name, len(derived["gates"]), 1.0)
            derived["own"] = (scale, *derived["own"])
        receives = [stage.receives for stage in self.stages]
        linear = [r for r in receives if isinstance(r, Linear)]
        derived["diagonal"] = any(r.diagonal for r in linear)
        if derived["diagonal"] and len(self.stages) > 1:
            got = len(self.stages)
            raise ValueError(f"cell {self.name!r}: expected one stage, being diagonal, got {got}")
        wide = [r.width or 0 for r in receives if isinstance(r, (Linear, Dense))]
        derived["widest"] = max(wide)
        plain = len(linear) == 1 and len(wide) == len(receives) and self.states == ("h",)
        if derived["widest"] and (derived["own"] or not plain):
            raise ValueError(
                f"cell {self.name!r}: expected h alone, one Linear stage and Dense ones beside it, "
                "and no vectors, where stages have a width"
            )
        derived["weighted"] = tuple(s for s in self.stages if not isinstance(s.receives, Mean))
        derived["dense"] = tuple(s for s in self.stages if isinstance(s.receives, Dense))
        derived["additive"] = not derived["dense"] and all(s.additive for s in self.stages)
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def units(self, H: int) -> int:
        """Units of the widest stage, of a layer with H."""
        return max(self.widest, H)

    def gate_units(self, H: int) -> int:
        """Units of each of `gates`."""
        receives = self.stages[0].receives
        return (isinstance(receives, Linear) and receives.width) or H

    def own_shapes(self, H: int, bias: bool) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters that only this cell has, in order: vectors, matrices."""
        shapes: dict[str, tuple[int, ...]] = {own.name: (own.vectors * H,) for own in self.own}
        for stage, (units, k) in zip(self.dense, self.dense_sizes(H), strict=True):
            receives: Any = stage.receives
            shapes |= dict.fromkeys(receives.weights, (units, k))
            shapes |= dict.fromkeys(receives.biases if bias else (), (units,))
        return shapes

    def columns(self, H: int) -> dict[str, int]:
        """Of each matrix of a Dense stage, by name, and of each bias, columns of the matrix."""
        found: dict[str, int] = {}
        for stage, (_units, k) in zip(self.dense, self.dense_sizes(H), strict=True):
            receives: Any = stage.receives
            found |= dict.fromkeys((*receives.weights, *receives.biases), k)
        return found

    def dense_sizes(self, H: int) -> list[tuple[int, int]]:
        """(units, K) of each Dense stage of a layer with H units."""
        sizes, k = [], self.gate_units(H)
        for stage in self.dense:
            receives: Any = stage.receives
            sizes.append((receives.width or H, k))
            k = sizes[-1][0]
        return sizes


def check_body(body: Callable[..., Any]) -> None:
    """Raises NameError where a body uses a global name that is not in the vocabulary, any
    attribute, such as a tensor's method, or what is no number of the function around it."""
    read = [(i.opname, i.argval) for i in dis.get_instructions(body)]
    names = {n for operation, n in read if operation in ("LOAD_GLOBAL", "IMPORT_NAME")}
    attributes = {f".{n}" for operation, n in read if operation in ("LOAD_ATTR", "LOAD_METHOD")}
    around = [n for n, value in numbers_of(body).items() if not isinstance(value, (int, float))]
    unknown = [*sorted(names - vocabulary.NAMES), *sorted(attributes), *around]
    if unknown:
        raise NameError(
            f"{body.__module__}.{body.__qualname__} uses {unknown}; "
            f"the body of a cell may use only {sorted(vocabulary.NAMES)}"
        )


def numbers_of(body: Callable[..., Any]) -> dict[str, Any]:
    """What a body reads of the function around it, by name: the options of its cell."""
    values = [cell.cell_contents for cell in body.__closure__ or ()]
    return dict(zip(body.__code__.co_freevars, values, strict=True))


def _project(x_gates, received, values, params):
    return (received[0],) + values[1:], ()


def _project_backward(d_values, saved, prev, new, params):
    d_h = d_values[0]
    return (), (d_h,), (zeros_like(d_h),) + d_values[1:], ()


PROJECTION = Stage(Projection(), _project, _project_backward, additive=True)


def register(cell: Cell) -> Cell:
    """Adds a cell to the registry. Raises ValueError where the name is taken, or is not a
    lower-case identifier: `fusedrnn.Recurrent` keeps it in upper case, as torch.nn does."""
    if not cell.name.isidentifier() or cell.name != cell.name.lower():
        raise ValueError(f"cell: expected a lower-case identifier as its name, got {cell.name!r}")
    if cell.name in REGISTRY:
        raise ValueError(f"cell {cell.name!r} is registered already")
    REGISTRY[cell.name] = cell
    if cell.projects:
        _PROJECTED[cell.name] = replace(cell, stages=(*cell.stages, PROJECTION))
    return cell


def family(make: Callable[..., Cell]) -> Callable[..., Cell]:
    """A decorator: registers the cell that `make` gives with its default options, and returns what
    gives those with others, `make(eps=0.1)`. Their names say it, `name(eps=0.1)`, and `get` finds
    them by these names in any process."""
    standard = register(make())
    signature = inspect.signature(make)

    def variant(**options: Any) -> Cell:
        given = signature.bind(**options)
        given.apply_defaults()
        shown = ", ".join(f"{k}={v!r}" for k, v in given.arguments.items())
        if given.arguments == {k: p.default for k, p in signature.parameters.items()}:
            return standard
        name = f"{standard.name}({shown})"
        if name not in _VARIANTS:
            _VARIANTS[name] = replace(make(**given.arguments), name=name)
        return _VARIANTS[name]

    _FAMILIES[standard.name] = variant
    return variant


def get(name: str, *, projected: bool = False) -> Cell:
    """The cell of that name; `projected`, with one stage more, which projects what was h (Sak,
    Senior & Beaufays 2014, arXiv:1402.1128). Raises ValueError, with the names there are."""
    table = _PROJECTED if projected else REGISTRY
    cell = table.get(name) if isinstance(name, str) else None
    if cell is None and isinstance(name, str) and not projected:
        cell = _variant(name)
    if cell is None:
        raise ValueError(f"cell must be one of {sorted(table)}, got {name!r}")
    return cell


def _variant(name: str) -> Cell | None:
    """The cell that `family` gave this name, made now if this process has not made it yet."""
    if name in _VARIANTS:
        return _VARIANTS[name]
    make = _FAMILIES.get(name.partition("(")[0])
    try:
        call: Any = ast.parse(name, mode="eval").body if make is not None else None
        options = {k.arg: ast.literal_eval(k.value) for k in call.keywords} if call else {}
        return make(**options) if make is not None else None
    except (AttributeError, SyntaxError, TypeError, ValueError):
        return None  # not the name of a cell, or of one with options that it has not

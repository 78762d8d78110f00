"""The rows of a sequence as a loop takes them: packed, longest first, in the order of its steps."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedrnn.call import Masks, Spec


@dataclass(frozen=True)
class Order:
    """Where the N rows of all steps lie: in a sequence tensor, and beside their neighbours in time.

    Attributes:
        sizes: how many rows there are in each step; never increasing, none 0.
        leading: the first dimensions of a sequence tensor, in which its rows are counted.
        source: [N] of each row, its number in the sequence tensor; None where that is its own.
        batch: [B] the element of the batch that is b-th longest; None where they are in order.
        before: [N] of each row, the state that it begins from, as a number among B initial states
            and, behind them, N later ones; None where it is the row's own number.
        last: [B] likewise, the state that the b-th longest ends with; None where these are the
            last B.
    """

    B: int
    N: int
    sizes: tuple[int, ...]
    leading: tuple[int, ...]
    source: Tensor | None = None
    batch: Tensor | None = None
    before: Tensor | None = None
    last: Tensor | None = None

    def rows_of(self, sequence: Tensor) -> Tensor:
        """[N, *] from a sequence tensor [*leading, *]."""
        rows = sequence if len(self.leading) == 1 else sequence.flatten(0, 1)
        return rows if self.source is None else rows.index_select(0, self.source)

    def sequence_of(self, rows: Tensor) -> Tensor:
        """The inverse of `rows_of`, in new memory, with 0 where no step is."""
        if self.source is None:
            return rows.reshape(*self.leading, *rows.shape[1:]).clone()
        total = self.leading[0] * (self.leading[1] if len(self.leading) == 2 else 1)
        new = torch.empty if total == self.N else torch.zeros
        sequence = new(total, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
        return sequence.index_copy_(0, self.source, rows).view(*self.leading, *rows.shape[1:])

    def sorted(self, state: Tensor) -> Tensor:
        """[B, *], longest first."""
        return state if self.batch is None else state.index_select(0, self.batch)

    def unsorted(self, state: Tensor) -> Tensor:
        """The inverse of `sorted`."""
        if self.batch is None:
            return state
        return torch.empty_like(state).index_copy_(0, self.batch, state)

    def states_before(self, states: Tensor) -> Tensor:
        """[N, *]: the states that the rows begin from, of [B + N, *]."""
        return states[: self.N] if self.before is None else states.index_select(0, self.before)

    def last_states(self, states: Tensor) -> Tensor:
        """[B, *]: the states that the elements of the batch end with, of [B + N, *]."""
        return states[-self.B :] if self.last is None else states.index_select(0, self.last)

    def by_row(self, per_element: Tensor) -> Tensor:
        """[N, *]: what belongs to the element of each row, of [B, *]."""
        return torch.cat([per_element[:0], *(per_element[:size] for size in self.sizes)])


def order_of(spec: Spec, input: Tensor, masks: Masks, *, reverse: bool) -> Order:
    """The order in which a direction takes the rows of `input`."""
    if masks.batch_sizes is not None:
        sizes = tuple(masks.batch_sizes.tolist())
        return _order(len(sizes), sizes[0], "packed", sizes, reverse)
    T, B = input.shape[:2][::-1] if spec.batch_first else input.shape[:2]
    layout = "batch first" if spec.batch_first else "time first"
    lengths = None if masks.lengths is None else tuple(masks.lengths.tolist())
    return _order(T, B, layout, lengths, reverse)


# All layers of a stack, forward and backward, have one order for each direction. On the CPU, even
# where a program has set another default.
@functools.lru_cache(maxsize=4)
def _order(T: int, B: int, layout: str, given: tuple[int, ...] | None, reverse: bool) -> Order:
    """`given`: the sizes of packed rows, or the lengths of padded ones."""
    with torch.inference_mode(False), torch.device("cpu"):
        return _worked_out(T, B, layout, given, reverse)


def _worked_out(T: int, B: int, layout: str, given: tuple[int, ...] | None, reverse: bool) -> Order:
    leading = {"packed": (sum(given or ()),), "time first": (T, B), "batch first": (B, T)}[layout]
    if given is None and (layout, reverse) == ("time first", False):
        return Order(B, T * B, (B,) * T, leading)
    t = torch.arange(T)[:, None]
    batch = None
    if layout == "packed":
        starts = torch.tensor((0, *(given or ()))).cumsum(0)
        lengths = (torch.tensor(given)[:, None] > torch.arange(B)).sum(0)
    elif given is None:
        lengths = torch.full((B,), T)
    else:
        lengths, batch = torch.tensor(given).clamp(0, T).sort(descending=True, stable=True)
    here = t < lengths
    sizes = tuple(n for n in here.sum(1).tolist() if n)
    t, b = here.nonzero(as_tuple=True)
    time = lengths[b] - 1 - t if reverse else t
    element = b if batch is None else batch[b]
    if layout == "packed":
        source = starts[time] + b
    else:
        source = time * B + element if layout == "time first" else element * T + time
    if given is None:
        return Order(B, T * B, sizes, leading, source)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    before = torch.cat([torch.zeros(1, dtype=torch.int64), B + offsets])[t] + b
    rank = torch.arange(B)
    last = torch.where(lengths > 0, B + offsets[(lengths - 1).clamp(min=0)], 0) + rank
    in_order = layout == "packed" and not reverse
    return Order(B, len(t), sizes, leading, None if in_order else source, batch, before, last)

"""Variable length: PackedSequence, lengths, and the row layout that they share.

A packed sequence stores the rows of time step t, longest sequence first, at `offsets[t] + b`;
a padded tensor at `t * B + b` or `b * T + t`. One addressing serves all three.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fusedrnn.types import Lengths


def check_batch_sizes(batch_sizes: Tensor, input: Tensor) -> None:
    """Raises for batch_sizes that do not describe the packed rows `input`: kernels, and torch's
    own packing, read and write as far as they say."""
    name = "batch_sizes: expected a tensor [T] of int64 on the CPU"
    if not isinstance(batch_sizes, Tensor):
        raise TypeError(f"{name}, got {type(batch_sizes).__name__}")
    if batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
        raise TypeError(f"{name}, got {batch_sizes.dtype} on {batch_sizes.device}")
    if batch_sizes.dim() != 1 or batch_sizes.numel() == 0:
        raise RuntimeError(f"{name} with T >= 1, got shape {tuple(batch_sizes.shape)}")
    if torch.compiler.is_compiling():  # the op that is called then looks at the values
        return
    steps = batch_sizes.tolist()
    if steps != sorted(steps, reverse=True) or steps[-1] < 1 or sum(steps) != len(input):
        raise RuntimeError(
            f"batch_sizes: expected rows of each time step, at least 1, never increasing, "
            f"{len(input)} in all, got {batch_sizes}"
        )


def check_order(name: str, order: Tensor, state: Tensor) -> None:
    """Raises for a permutation `order` that has not one entry for each row of state [L, B, H]."""
    if order.shape != state.shape[1:2]:
        raise RuntimeError(
            f"{name}: expected shape ({state.shape[1]},), an index for each row of the batch, "
            f"got {tuple(order.shape)}"
        )


def lengths_of(batch_sizes: Tensor) -> Tensor:
    """[B] lengths, longest first, from batch_sizes [T] (both int64, on the CPU)."""
    B = int(batch_sizes[0])
    return (batch_sizes[:, None] > torch.arange(B, device=batch_sizes.device)[None, :]).sum(0)


def offsets_of(batch_sizes: Tensor) -> Tensor:
    """[T] int64: the packed row at which each time step begins."""
    return batch_sizes.cumsum(0) - batch_sizes


def pad(data: Tensor, batch_sizes: Tensor) -> Tensor:
    """[T, B, *] from packed rows [N, *]; the padding is 0."""
    return pad_packed_sequence(PackedSequence(data, batch_sizes))[0]


def unpad(padded: Tensor, batch_sizes: Tensor) -> Tensor:
    """Packed rows [N, *] from [T, B, *]; the inverse of `pad`."""
    return pack_padded_sequence(padded, lengths_of(batch_sizes)).data


def as_lengths(lengths: Lengths, T: int, B: int, *, batch_first: bool, unbatched: bool) -> Tensor:
    """`lengths` as an integer tensor [B], from what `Lengths` allows.

    Integers on a device are not looked at, which would mean waiting for it; a mask is, wherever
    it lies, since one with holes would be another computation.

    Raises:
        TypeError, RuntimeError: no integers, or not [B] of them.
        ValueError: a mask that is not true from a row's first step on and false from some step on.
    """
    if not isinstance(lengths, Tensor):
        try:
            lengths = torch.as_tensor(lengths)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"lengths: expected {B} integers or a bool mask, as a tensor, a NumPy array or a "
                f"list, got {type(lengths).__name__}: {error}"
            ) from error
        if lengths.numel() == 0:
            lengths = lengths.to(torch.int64)  # of an empty list, as of no number, float32
    if lengths.dtype == torch.bool:
        return _lengths_of_mask(lengths, T, B, batch_first, unbatched)
    if unbatched and lengths.dim() == 0:
        lengths = lengths.reshape(1)
    if lengths.is_floating_point() or lengths.is_complex():
        raise TypeError(f"lengths: expected integers or a bool mask, got {lengths.dtype}")
    if lengths.shape != (B,):
        raise RuntimeError(f"lengths: expected shape ({B},), got {tuple(lengths.shape)}")
    return lengths.to(torch.int64)


def _lengths_of_mask(mask: Tensor, T: int, B: int, batch_first: bool, unbatched: bool) -> Tensor:
    shape = (T,) if unbatched else (B, T) if batch_first else (T, B)
    if mask.shape != shape:
        raise RuntimeError(
            f"lengths: expected a bool mask of shape {shape}, true where a step is real, "
            f"got {tuple(mask.shape)}"
        )
    mask = mask.reshape(T, B) if unbatched else mask.T if batch_first else mask
    if not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        holes = mask[1:] & ~mask[:-1]
        if mask.device.type != "meta" and bool(holes.any()):
            t, b = holes.nonzero()[0].tolist()
            raise ValueError(
                f"lengths: expected a mask that is true from the first step of a row to its last "
                f"real one; in row {b} step {t} is false and step {t + 1} true"
            )
    return mask.sum(0)


def check_length_values(lengths: Tensor, T: int) -> None:
    """Raises for lengths on the CPU that are not in [0, T]."""
    if lengths.numel() and (int(lengths.min()) < 0 or int(lengths.max()) > T):
        raise ValueError(
            f"lengths: expected values from 0 to T={T}, "
            f"got values from {int(lengths.min())} to {int(lengths.max())}"
        )


@dataclass(frozen=True)
class Rows:
    """Where the row of (time t, batch b) lies in a sequence tensor [N, ...].

        row(t, b) = t * stride_t + b * stride_b        padded
        row(t, b) = offsets[t] + b                     packed

    Attributes:
        offsets: [T] int64 on the device; packed rows only.
        lengths: [B] int64 on the device; row b exists for t < lengths[b]. Packed rows have it.
        reverse: whether a single direction runs from each row's last time step to its first, as
            the second of two directions does.
    """

    T: int
    B: int
    stride_t: int
    stride_b: int
    offsets: Tensor | None = None
    lengths: Tensor | None = None
    reverse: bool = False

    def reverses(self, D: int) -> tuple[bool, ...]:
        """Of each of D directions, whether it runs backwards in time."""
        return (False, True) if D == 2 else (self.reverse,)


def rows_of(
    input: Tensor, batch_first: bool, lengths: Tensor | None, batch_sizes: Tensor | None
) -> Rows:
    """The rows of `input`: [T, B, I], [B, T, I] (batch_first) or packed [N, I]."""
    device = input.device
    if batch_sizes is not None:
        # Copied from pinned memory, so that the host does not wait for the device.
        lengths, offsets = lengths_of(batch_sizes), offsets_of(batch_sizes)
        # Pad to 16 bytes: Triton specialises on alignment and would compile a second kernel.
        start = lengths.numel() + lengths.numel() % 2
        both = torch.cat([lengths, lengths.new_zeros(start - lengths.numel()), offsets])
        if device.type == "cuda":
            both = both.pin_memory().to(device, non_blocking=True)
        B, T = int(batch_sizes[0]), batch_sizes.numel()
        return Rows(T, B, 0, 1, lengths=both[:B], offsets=both[start:])
    T, B = input.shape[:2][::-1] if batch_first else input.shape[:2]
    if lengths is not None:  # on a GPU nobody has looked at them, and they become addresses
        lengths = lengths.to(device=device, dtype=torch.int64).clamp(0, T)
    if batch_first:
        return Rows(T, B, 1, T, lengths=lengths)
    return Rows(T, B, B, 1, lengths=lengths)


def previous_h(output_ndh: Tensor, h_0: Tensor, rows: Rows) -> Tensor:
    """[N, D, H]: the h that each step of each direction began from; h_0 is [D, B, H].

    Rows that do not exist hold anything; their gradient is 0.
    """
    reverses = rows.reverses(len(h_0))
    if rows.offsets is None and rows.stride_b == 1 and reverses == (False,):
        return torch.cat([h_0.transpose(0, 1), output_ndh[: -rows.B]])
    h_prev = torch.empty_like(output_ndh)
    if rows.offsets is not None and rows.lengths is not None:
        return _previous_h_packed(output_ndh, h_0, rows.offsets, rows.lengths, reverses, h_prev)
    if rows.stride_b == 1:
        steps, before = (t.view(rows.T, rows.B, *t.shape[1:]) for t in (output_ndh, h_prev))
    else:
        steps, before = (
            t.view(rows.B, rows.T, *t.shape[1:]).transpose(0, 1) for t in (output_ndh, h_prev)
        )
    for d, reverse in enumerate(reverses):
        if not reverse:
            before[0, :, d] = h_0[d]
            before[1:, :, d] = steps[:-1, :, d]
            continue
        before[:-1, :, d] = steps[1:, :, d]
        before[-1, :, d] = h_0[d]
        if rows.lengths is not None:
            last = (rows.lengths - 1).clamp(min=0)
            before[last, torch.arange(rows.B, device=last.device), d] = h_0[d]
    return h_prev


def _previous_h_packed(output_ndh, h_0, offsets, lengths, reverses, h_prev):
    N = output_ndh.shape[0]
    row = torch.arange(N, device=output_ndh.device)
    t = _packed_time(offsets, N)
    b = row - offsets[t]
    for d, reverse in enumerate(reverses):
        edge = t == lengths[b] - 1 if reverse else t == 0
        neighbour = (t + 1 if reverse else t - 1).clamp(0, offsets.numel() - 1)
        # Where the neighbour is over the edge its row is another sequence's: masked by `edge`.
        source = torch.where(edge, row, offsets[neighbour] + b).clamp(max=N - 1)
        h_prev[:, d] = torch.where(edge[:, None], h_0[d, b], output_ndh[source, d])
    return h_prev


def _packed_time(offsets: Tensor, N: int) -> Tensor:
    """[N]: the time step of every packed row."""
    row = torch.arange(N, device=offsets.device)
    return torch.searchsorted(offsets, row, right=True) - 1


def rows_over(rows: Rows, lengths: Tensor) -> Tensor:
    """[N] bool: whether a padded row lies beyond the length of its element of the batch."""
    t = torch.arange(rows.T, device=lengths.device)
    over = t[:, None] >= lengths if rows.stride_b == 1 else t >= lengths[:, None]
    return over.flatten()


def by_row(per_element: Tensor, rows: Rows, N: int) -> Tensor:
    """[N, D, H]: what belongs to every row's element of the batch, of a tensor [D, B, H]."""
    row = torch.arange(N, device=per_element.device)
    if rows.offsets is not None:
        b = row - rows.offsets[_packed_time(rows.offsets, N)]
    else:
        b = row % rows.B if rows.stride_b == 1 else row // rows.T
    return per_element[:, b].transpose(0, 1)


def turned(sequence: Tensor, rows: Rows) -> Tensor:
    """`sequence`, [T, B, *], [B, T, *] or [N, *], with the time steps of every row in reverse
    order, up to its length. Its own inverse."""
    if rows.T == 1:  # where both layouts have a stride of 1
        return sequence
    if rows.lengths is None:
        return sequence.flip(0 if rows.stride_b == 1 else 1)
    if rows.offsets is not None:
        row = torch.arange(len(sequence), device=sequence.device)
        t = _packed_time(rows.offsets, len(sequence))
        b = row - rows.offsets[t]
        return sequence.index_select(0, rows.offsets[rows.lengths[b] - 1 - t] + b)
    t = torch.arange(rows.T, device=sequence.device)[:, None]
    t = torch.where(t < rows.lengths, rows.lengths - 1 - t, t)
    row = t * rows.stride_t + torch.arange(rows.B, device=sequence.device) * rows.stride_b
    row = row if rows.stride_b == 1 else row.T
    return sequence.flatten(0, 1).index_select(0, row.flatten()).view_as(sequence)


def starts_of(reset: Tensor, lengths: Tensor | None, reverses: tuple[bool, ...]) -> Tensor:
    """[T, B, D] bool: before which steps, in a direction's own order, its state starts over.

    `reset` is [T, B]: where a sequence begins inside a row; it means nothing beyond a row's
    length. `reverses`, of each direction: backwards, the boundary before step t + 1 lies before
    step t.
    """
    if lengths is not None:
        reset = reset & (torch.arange(reset.shape[0], device=reset.device)[:, None] < lengths)
    back = torch.cat([reset[1:], torch.zeros_like(reset[:1])]) if any(reverses) else reset
    return torch.stack([back if reverse else reset for reverse in reverses], dim=-1)


def starts_by_row(reset: Tensor, rows: Rows, batch_first: bool, D: int) -> Tensor:
    """[N, D] int8: `starts_of` in the order of padded rows."""
    starts = starts_of(reset.T if batch_first else reset, rows.lengths, rows.reverses(D))
    if batch_first:
        starts = starts.transpose(0, 1)
    return starts.reshape(-1, D).to(torch.int8)


def started_over(
    h_prev_ndh: Tensor, starts_nd: Tensor, reset_state: tuple[Tensor, ...], rows: Rows
) -> Tensor:
    """`h_prev_ndh`, replaced by reset_state[0] [D, B, H], or by 0, where a state started over."""
    begins = (starts_nd != 0)[:, :, None]
    if not reset_state:
        return h_prev_ndh.masked_fill_(begins, 0)
    return torch.where(begins, by_row(reset_state[0], rows, h_prev_ndh.shape[0]), h_prev_ndh)

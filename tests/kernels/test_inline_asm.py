"""The interpreter's assembly, against what the PTX manual says of every instruction.

And the text that `sync.load` polls with, on memory that changes under it.
"""

from __future__ import annotations

import numpy as np
import pytest
from inline_asm import Threads

from fusedrnn.kernels import sync


class Array:
    """Memory of 16-bit elements, at address 0; `then` is called after every load."""

    def __init__(self, elements, then=lambda memory: None):
        self.elements = np.array(elements, np.uint16)
        self.then = then
        self.loaded: list[list[int]] = []  # the addresses of each load
        self.acquired: list[int] = []  # the numbers of those that acquire

    def relaxed_load(self, pointers, acquire=False):
        if acquire:
            self.acquired.append(len(self.loaded))
        octets = self.elements.view(np.uint8)
        self.loaded.append(pointers.data[:, 0].tolist())
        each = pointers.data[..., None].astype(int) + np.arange(4)
        words = octets[each].view(np.int32)[..., 0]
        self.then(self)
        return words

    def relaxed_store(self, pointers, values):
        octets = self.elements.view(np.uint8)
        each = pointers.data[..., None].astype(int) + np.arange(values.itemsize)
        octets[each] = np.ascontiguousarray(values)[..., None].view(np.uint8)


def execute(text: str, memory=None, **registers) -> dict[str, np.ndarray]:
    """The registers, in which `_1` stands for `$1`, after one thread for each of their values."""
    arrays = {name.replace("_", "$"): np.array(values) for name, values in registers.items()}
    arrays = {n: a if a.dtype == np.uint64 else a.astype(np.uint32) for n, a in arrays.items()}
    threads = Threads(memory, len(next(iter(arrays.values()))), arrays)
    threads.run(text)
    return threads.registers


@pytest.mark.parametrize(
    ("operation", "operands", "result"),
    [
        ("mov.b32", (0xFFFF0001,), 0xFFFF0001),
        ("min.s32", (0x80000000, 0x7FFFFFFF), 0x80000000),
        ("min.s32", (0xFFFFFFFF, 0), 0xFFFFFFFF),
        ("min.s32", (5, 3), 3),
        ("min.s16x2", (0x80000001, 0x7FFF8000), 0x80008000),
        ("min.s16x2", (0x0001FFFF, 0x00020000), 0x0001FFFF),
        ("min.s16x2", (0x8000FFFF, 0xFFFF8000), 0x80008000),
        ("prmt.b32", (0x33221100, 0x77665544, 0x3210), 0x33221100),
        ("prmt.b32", (0x33221100, 0x77665544, 0x1032), 0x11003322),
        ("prmt.b32", (0x33221100, 0x77665544, 0x7650), 0x77665500),
        ("sub.u32", (0, 0x00010001), 0xFFFEFFFF),
        ("sub.s32", (5, 1), 4),
        ("xor.b32", (0x80000001, 0x80008000), 0x00008001),
        ("and.b32", (0x80010000, 0x80008000), 0x80000000),
        ("or.b32", (0x80000000, 1), 0x80000001),
        ("not.b32", (0x00FF00FF,), 0xFF00FF00),
        ("setp.eq.b32", (0x80008000, 0x80008000), True),
        ("setp.eq.b32", (0x80008000, 0x80000000), False),
        ("setp.eq.s32", (0, 0), True),
        ("setp.ne.b32", (0, 0), False),
        ("setp.ne.b32", (1, 0), True),
        ("setp.ne.s32", (1, 0), True),
        ("setp.ne.s32", (7, 7), False),
        ("setp.lt.s32", (0xFFFFFFFF, 0), True),
        ("setp.lt.s32", (3, 3), False),
    ],
)
def test_an_instruction(operation, operands, result):
    names = [f"${n + 1}" for n in range(len(operands))]
    registers = {f"_{n + 1}": [value, value] for n, value in enumerate(operands)}
    found = execute(f"{operation} $0, {', '.join(names)};", **registers)["$0"]
    assert found.tolist() == [result, result]
    literals = ", ".join(map(hex, operands[1:]))
    text = f"{operation} $0, $1{', ' if literals else ''}{literals};"
    assert execute(text, _1=[operands[0]])["$0"].tolist() == [result]


def test_what_it_does_not_know_is_an_error():
    with pytest.raises(KeyError, match=r"add\.f32"):
        execute("add.f32 $0, $1, $1;", _1=[1])
    with pytest.raises(KeyError, match=r"ld\.global\.b32"):
        execute("ld.global.b32 $0, [$1];", _1=[1])
    with pytest.raises(ValueError, match="nowhere"):
        execute("mov.b32 $0, nowhere;", _1=[1])
    address = np.array([8], np.uint64)
    with pytest.raises(AssertionError, match="unaligned"):
        execute("ld.relaxed.gpu.global.v4.b32 {a, b, c, d}, [$0];", Array([0] * 16), _0=address)


def test_guards_choose_threads():
    text = """{
        .reg .pred p;
        setp.eq.s32 p, $1, 2;
        @p mov.b32 $2, 7;
        @!p mov.b32 $3, 8;
    }"""
    found = execute(text, _1=[1, 2, 3], _2=[0, 0, 0], _3=[0, 0, 0])
    assert found["$2"].tolist() == [0, 7, 0]
    assert found["$3"].tolist() == [8, 0, 8]


def test_threads_loop_as_often_as_each_of_them_needs():
    text = """{
        mov.b32 $0, 0;
        AGAIN: setp.eq.s32 p, $1, 0;
        @p bra DONE;
        sub.s32 $1, $1, 1;
        xor.b32 $0, $0, $2;
        bra AGAIN;
        DONE:
    }"""
    assert execute(text, _1=[0, 1, 2, 5], _2=[9, 9, 9, 9])["$0"].tolist() == [0, 9, 0, 9]


def test_threads_that_part_meet_again():
    """One thread jumps over what the others do; none does anything twice."""
    text = """{
        setp.eq.s32 p, $1, 1;
        @p bra OTHER;
        sub.s32 $0, $0, 1;
        bra DONE;
        OTHER:
        sub.s32 $0, $0, 16;
        DONE:
        sub.s32 $0, $0, 256;
    }"""
    assert execute(text, _0=[512] * 3, _1=[0, 1, 0])["$0"].tolist() == [255, 240, 255]


def test_loads_and_stores():
    memory = Array(range(32))
    base = np.array([0, 32], np.uint64)
    text = """
        ld.relaxed.gpu.global.v4.b32 {$1, $2, $3, $4}, [$0 + 16];
        ld.relaxed.gpu.global.b32 $5, [$0];
        setp.ne.b32 p, $5, 0x10000;
        @p st.relaxed.gpu.global.b16 [$0], $1;
        @!p st.relaxed.gpu.global.b32 [$0 + 4], $4;
    """
    found = execute(text, memory, _0=base)
    assert [found[f"${n}"].tolist() for n in (1, 4, 5)] == [
        [0x00090008, 0x00190018],
        [0x000F000E, 0x001F001E],
        [0x00010000, 0x00110010],
    ]
    expected = list(range(32))
    expected[2:4] = 14, 15  # by the first thread
    expected[16] = 24  # by the second: the lower half of $1
    assert memory.elements.tolist() == expected


# --- the text of sync.load ----------------------------------------------------------------------

COUNT, VECTORS, STRIDE = 2, 2, 64
COUNTER, GAVE_UP = 256, 384  # bytes
MINUS_ZERO = 0x8000
KINDS = {"32 bit": (4, False), "pairs": (8, True), "bit by bit": (8, False)}  # LENGTH, PAIRWISE


def poll(memory: Array, kind: str, limit: int, threads: int = 1, arrived: int = 0) -> np.ndarray:
    """[threads, COUNT * VECTORS * 4] words, by two chunks of two rows 32 bytes apart; a thread's
    rows lie 16 bytes beside those of the thread before."""
    length, pairwise = KINDS[kind]
    outputs, elements = 4 * COUNT * VECTORS, VECTORS * length
    offsets = [n * STRIDE for n in range(COUNT)]
    text = sync.assembly.fn(offsets, VECTORS, length, pairwise, elements, 4 * VECTORS)
    registers = {}
    for n in range(elements):
        row = np.arange(threads) * 16 + n // length * 32 + n % length * 16 // length
        registers[f"_{outputs + n}"] = row.astype(np.uint64)
    first = outputs + elements + 4 * VECTORS
    for n in range(elements):
        registers[f"_{first + n}"] = np.full(threads, COUNTER, np.uint64)
        registers[f"_{first + elements + n}"] = np.full(threads, limit)
        registers[f"_{first + 2 * elements + n}"] = np.full(threads, 11)  # the step
        registers[f"_{first + 3 * elements + n}"] = np.full(threads, arrived)
    found = execute(text, memory, **registers)
    return np.stack([found[f"${n}"] for n in range(outputs)], 1)


def filled() -> np.ndarray:
    """64 elements of one thread's chunks and more, the counter, the word of who has given up."""
    elements = np.arange(1, 195, dtype=np.uint16)
    elements[128:] = 0
    return elements


def words_at(elements: np.ndarray, thread: int = 0) -> list[int]:
    words = elements.view(np.uint32)
    starts = [chunk * STRIDE + row * 32 + thread * 16 for chunk in range(2) for row in range(2)]
    return [int(word) for start in starts for word in words[start // 4 : start // 4 + 4]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_poll_takes_what_is_there(kind):
    memory = Array(filled())
    assert poll(memory, kind, 0)[0].tolist() == words_at(filled())
    assert len(memory.loaded) == 4
    assert memory.elements[-2:].tolist() == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_poll_waits_for_every_single_element(kind):
    """Whichever it is: the vector in which it lies is loaded again, and no other."""
    size = 16 // KINDS[kind][0] // 2  # of an element, in halves of a word
    for vector, start in enumerate((0, 32, 64, 96)):
        for n in range(KINDS[kind][0]):
            at = start // 2 + n * size
            elements = filled()
            right = elements[at : at + size].copy()
            elements[at : at + size] = [0, MINUS_ZERO][-size:]

            def arrive(memory, at=at, right=right):
                if len(memory.loaded) == 7:
                    memory.elements[at : at + len(right)] = right

            memory = Array(elements, arrive)
            assert poll(memory, kind, 9)[0].tolist() == words_at(filled())
            # Four vectors; whether anybody gave up, and the missing one, again and again.
            assert memory.loaded == [[0], [32], [64], [96]] + [[GAVE_UP], [start]] * 2, vector


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [0x0000, 0x8001, 0x7FFF, 0xFFFF, 0x7F80, 0x0080])
def test_only_minus_zero_is_missing(kind, bits):
    """Not its neighbours either, nor NaN; in any place, beside any other."""
    for other in (0x0000, 0x7FFF, 0xFFFF, 0x0001):
        elements = filled()
        elements[:64:2], elements[1:64:2] = bits, other
        memory = Array(elements)
        assert poll(memory, kind, 0)[0].tolist() == words_at(elements)
        assert len(memory.loaded) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_each_thread_polls_for_itself(kind):
    elements = filled()
    elements[6:8] = 0, MINUS_ZERO  # of thread 0
    elements[62:64] = 0, MINUS_ZERO  # of thread 1, in its last vector

    def arrive(memory):
        if len(memory.loaded) == 8:
            memory.elements[6:8] = 7, 8
        if len(memory.loaded) == 11:
            memory.elements[62:64] = 63, 64

    memory = Array(elements, arrive)
    found = poll(memory, kind, 9, threads=2)
    assert [row.tolist() for row in found] == [words_at(filled(), 0), words_at(filled(), 1)]
    assert memory.loaded[4:7] == [[GAVE_UP, GAVE_UP], [0], [112]]
    assert memory.loaded[-1] == [112]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [0, 1, 5])
def test_a_poll_gives_up_with_nan_and_says_so(kind, limit):
    elements = filled()
    elements[6:8] = 0, MINUS_ZERO
    memory = Array(elements)
    found = poll(memory, kind, limit)
    dtype = np.float32 if kind == "32 bit" else np.float16
    assert np.isnan(found.view(dtype)).all()
    assert memory.elements[-2:].tolist() == [11, 0]
    assert len(memory.loaded) == 4 + 2 * limit


@pytest.mark.parametrize("kind", KINDS)
def test_a_poll_ends_when_another_gave_up(kind):
    elements = filled()
    elements[6:8] = 0, MINUS_ZERO
    elements[GAVE_UP // 2] = 3
    memory = Array(elements)
    found = poll(memory, kind, 1000)
    dtype = np.float32 if kind == "32 bit" else np.float16
    assert np.isnan(found.view(dtype)).all()
    assert memory.elements[-2:].tolist() == [3, 0]  # as the other said
    assert len(memory.loaded) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_poll_waits_for_arrivals_first(kind):
    """Every thread acquires for itself, and nothing of the ring is read before."""

    def arrive(memory):
        if len(memory.loaded) % 2 == 0:
            memory.elements[COUNTER // 2] += 1

    memory = Array(filled(), arrive)
    found = poll(memory, kind, 9, threads=2, arrived=3)
    assert [row.tolist() for row in found] == [words_at(filled(), 0), words_at(filled(), 1)]
    counter, told = [COUNTER] * 2, [GAVE_UP] * 2
    assert memory.loaded[:8] == [told, counter] * 4
    assert memory.loaded[8:] == [[0, 16], [32, 48], [64, 80], [96, 112]]
    assert memory.acquired == [1, 3, 5, 7]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gave_up", [0, 3])
def test_waiting_for_arrivals_ends_as_a_poll_does(kind, gave_up):
    elements = filled()
    elements[COUNTER // 2] = 2
    elements[GAVE_UP // 2] = gave_up
    memory = Array(elements)
    found = poll(memory, kind, 5, arrived=3)
    dtype = np.float32 if kind == "32 bit" else np.float16
    assert np.isnan(found.view(dtype)).all()
    assert memory.elements[-2:].tolist() == [gave_up or 11, 0]
    assert memory.loaded == [[GAVE_UP], [COUNTER]] * (1 if gave_up else 5)

"""Is the compiled code laid out as `sync.load` needs it?

Its block of assembly reads one vector of 16 bytes for each row of a tile, so every thread must
hold whole rows, in order. Triton leaves the layout of a tile to its compiler. The one that is
needed is the one that it gives to a load of such a tile; nothing in the language demands it.
"""

import functools
import re

import triton


@functools.cache
def check(kernel) -> None:
    """Looks at a compiled kernel that exchanges; once, since it is kept.

    Raises:
        RuntimeError: the assembly that loads is not there, or its tiles are laid out otherwise.
    """
    if "ttgir" in kernel.asm:
        found = faults(kernel.asm["ttgir"], kernel.metadata.num_warps)
    else:
        found = ["its TTGIR, which would show, was not kept (TRITON_STORE_BINARY_ONLY)"]
    if found:
        raise RuntimeError(
            f"Triton {triton.__version__} compiled {kernel.metadata.name} to code whose results "
            f"cannot be relied on: {'; '.join(found)}. Use another version of Triton"
        )


def faults(ttgir: str, warps: int) -> list[str]:
    """What is wrong with the layouts around `sync.load` in Triton's GPU dialect."""
    layouts = dict(re.findall(r"^(#\w+) = (.+)$", ttgir, re.MULTILINE))
    found, blocks = [], 0
    if "ttng.warp_group_dot" in ttgir:
        return faults_of_warp_groups(ttgir)
    for line in ttgir.splitlines():
        block = re.search(r"tt\.elementwise_inline_asm .*packed_element = (\d+) : i32(.*)", line)
        if block is None or int(block[1]) == 1:
            continue
        blocks += 1
        tiles = re.findall(r"tensor<([\dx]+)x\w+, (#\w+)>", block[2])
        for shape, name in tiles:
            rows, *columns = map(int, shape.split("x"))
            layout = dict(re.findall(r"(\w+) = (\[[^\]]*\])", layouts.get(name, "")))
            needed = {
                "sizePerThread": str([1, *columns]),
                "threadsPerWarp": "[32, 1]",
                "warpsPerCTA": f"[{warps}, 1]",
                "order": "[1, 0]",
            }
            given = {field: layout.get(field) for field in needed}
            if given != needed:
                found.append(f"a tile of {shape} lies as {layouts.get(name, name)}")
            elif rows * columns[0] != 32 * warps * int(block[1]):
                found.append(f"a tile of {shape} goes into {block[1]} elements of a thread")
        if not tiles:
            found.append("a block of assembly without tiles")
    if not blocks:
        found.append("no assembly that loads what is exchanged")
    return list(dict.fromkeys(found))


def faults_of_warp_groups(ttgir: str) -> list[str]:
    """What is wrong where `wgmma` multiplies: its left operand differs between the warp groups,
    which no layout says, so that nothing may move it from thread to thread."""
    found = []
    if re.search(r"ttg\.(convert_layout|local_alloc|local_store) .*#ttg\.dot_op", ttgir):
        found.append("a left operand of a warp group's product changes its layout")
    if not re.search(r"tt\.elementwise_inline_asm .*ld\.relaxed", ttgir):
        found.append("no assembly that loads what is exchanged")
    return found

"""Machine code made by hand, in the form that `nvdisasm -hex -c` prints."""

from bench.machine_code import NO_BARRIER


def line(address: int, text: str, stall=1, write=NO_BARRIER, read=NO_BARRIER, wait=()) -> str:
    """One instruction, whose upper half holds the scheduling bits."""
    control = stall | write << 5 | read << 8 | sum(1 << b for b in wait) << 11
    return (
        f"        /*{address:04x}*/                   {text} ;      /* 0x000000ff00147202 */\n"
        f"                                                        /* 0x{control << 41:016x} */"
    )


def program(*parts) -> str:
    """A program: labels (names that end in a colon), texts, or (text, {scheduling bits})."""
    lines, address = [], 0
    for part in parts:
        text, bits = part if isinstance(part, tuple) else (part, {})
        if text.endswith(":"):
            lines.append(f".{text}")
            continue
        lines.append(line(address, text, **bits))
        address += 16
    return "\n".join(lines) + "\n"


def step(*parts) -> str:
    """A time loop around the parts."""
    return program("L_x_0:", *parts, "@P0 BRA `(.L_x_0)", "EXIT")

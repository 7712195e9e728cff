"""Other values to try the tool with: of the same kind as a given one, small and large, short and long. Pure."""

from __future__ import annotations

import ipaddress
import random
import re
import string

_LETTERS = string.ascii_lowercase + string.digits


def ladders(value: str, rng: random.Random) -> list[list[str]]:
    """Lists of values to put in ``value``'s place: of each list the first that the tool accepts is worth trying.

    The first lists reach for the largest value of the kind, later ones for the smallest, so that what is learnt
    from them holds for all in between.
    """
    if "," in value:
        parts = [ladders(part, rng) for part in value.split(",")]
        return [[",".join(choice) for choice in zip(*ladder, strict=False)] for ladder in zip(*parts, strict=False)]
    for kind in (_integers, _addresses, _macs, _rates):
        found = kind(value, rng)
        if found:
            return found
    return _texts(value, rng)


def _integers(value: str, rng: random.Random) -> list[list[str]]:
    if not re.fullmatch(r"0x[0-9a-fA-F]+|\d+", value):
        return []
    form = hex if value.startswith("0x") else str
    number = int(value, 0) if value.startswith("0x") else int(value)
    near = [number + 1, number - 1, number * 2, number // 2]
    wide = [
        rng.randrange(1 << 62, 1 << 63),
        rng.randrange(1 << 31, 1 << 32),
        rng.randrange(1 << 30, 1 << 31),
        rng.randrange(0x8000, 0x10000),
        rng.randrange(0x80, 0x100),
        rng.randrange(33, 128),
    ]
    middle = [rng.randrange(0x1000, 0x8000), rng.randrange(16, 0x80), rng.randrange(8, 30)]
    small = [rng.randrange(2, 10), *near]
    return [[form(each) for each in ladder if each >= 0 and each != number] for ladder in (wide, middle, small)]


def _addresses(value: str, rng: random.Random) -> list[list[str]]:
    address, slash, length = value.partition("/")
    try:
        old = ipaddress.ip_address(address)
    except ValueError:
        return []
    bits = old.max_prefixlen
    kind = type(old)

    def other(keep: int) -> str:
        return str(kind((int(old) & ~((1 << (bits - keep)) - 1)) | rng.getrandbits(bits - keep)))

    if not slash:
        return [[other(4)], [other(4)], [other(bits - 8)]]
    lengths = [length, str(rng.randrange(bits // 4, bits // 2)), str(rng.randrange(bits // 2, bits))]
    if not length.isdigit():
        lengths = [length] * 3
    return [[f"{other(4)}/{each}", f"{other(4)}/{length}"] for each in lengths]


def _macs(value: str, rng: random.Random) -> list[list[str]]:
    if not re.fullmatch(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", value):
        return []
    return [[":".join(f"{byte:02x}" for byte in (2, *rng.randbytes(5)))] for _ in range(2)]


def _rates(value: str, rng: random.Random) -> list[list[str]]:
    match = re.fullmatch(r"(\d+)(/[a-z]+)", value)
    if not match:
        return []
    return [[f"{rng.randrange(low, high)}{match[2]}"] for low, high in ((500, 1000), (20, 99), (2, 9))]


def _texts(value: str, rng: random.Random) -> list[list[str]]:
    def word(length: int) -> str:
        return rng.choice(string.ascii_lowercase) + "".join(rng.choice(_LETTERS) for _ in range(length - 1))

    long = [word(length) for length in (255, 200, 127, 63, 40, 31, 28, 25, 20, 15, 12, 8)]
    digits = re.sub(r"\d+", lambda _: str(rng.randrange(100, 999)), value)
    more = re.sub(r"\d+", lambda _: str(rng.randrange(2, 9)), value)
    numbers = [digits, more] if digits != value else []
    return [long, [word(len(value)), *numbers], [word(3), word(1), *reversed(numbers)]]

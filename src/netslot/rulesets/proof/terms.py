"""Numbers and truths that are either known (int, bool) or unknown (z3 bit vectors and booleans).

One walk serves both: with known values it computes what happens to a packet, with unknown ones it builds the
formula. Whatever is known is decided here and now, so that formulas hold only what is open.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, TypeAlias

Number: TypeAlias = Any
"""int, or a z3 bit vector."""

Truth: TypeAlias = Any
"""bool, or a z3 boolean."""


@cache
def solver() -> Any:
    """The z3 module. Imported at the first unknown: splitting and migrating need none, and live without it."""
    return importlib.import_module("z3")


def _joined(make: Callable[..., Any], truths: Sequence[Any]) -> Any:
    """What z3's And and Or do, without asking every operand for its sort: that is most of the time of a proof."""
    context = truths[0].ctx
    operands = (solver().Ast * len(truths))(*(truth.as_ast() for truth in truths))
    return solver().BoolRef(make(context.ref(), len(truths), operands), context)


def both(a: Truth, b: Truth) -> Truth:
    if a is False or b is False:
        return False
    if a is True:
        return b
    return a if b is True else _joined(solver().Z3_mk_and, (a, b))


def either(a: Truth, b: Truth) -> Truth:
    if a is True or b is True:
        return True
    if a is False:
        return b
    return a if b is False else _joined(solver().Z3_mk_or, (a, b))


def negate(a: Truth) -> Truth:
    return (not a) if isinstance(a, bool) else solver().Not(a)


def differ(a: Truth, b: Truth) -> Truth:
    if isinstance(a, bool):
        return negate(b) if a else b
    if isinstance(b, bool):
        return negate(a) if b else a
    return False if a.eq(b) else solver().Xor(a, b)


def any_of(truths: Iterable[Truth]) -> Truth:
    """Flat, so that a thousand alternatives do not nest a thousand deep."""
    unknown = []
    for truth in truths:
        if truth is True:
            return True
        if truth is not False:
            unknown.append(truth)
    if not unknown:
        return False
    return unknown[0] if len(unknown) == 1 else _joined(solver().Z3_mk_or, unknown)


def all_of(truths: Iterable[Truth]) -> Truth:
    return negate(any_of(negate(truth) for truth in truths))


def equal(a: Number, b: Number) -> Truth:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if not isinstance(a, int) and not isinstance(b, int) and a.eq(b):
        return True
    return a == b


def masked_equal(a: Number, mask: int, value: int, width: int) -> Truth:
    """``a & mask == value``."""
    if isinstance(a, int):
        return a & mask == value
    if value & ~mask:
        return False
    return a == value if mask == (1 << width) - 1 else (a & mask) == value


def within(a: Number, low: int, high: int) -> Truth:
    """``low <= a <= high``, unsigned."""
    if isinstance(a, int):
        return low <= a <= high
    if low == high:
        return a == low
    top = (1 << a.size()) - 1
    upper = True if high >= top else solver().ULE(a, high)
    return both(True if low == 0 else solver().UGE(a, low), upper)


def choose(condition: Truth, a: Number, b: Number, width: int) -> Number:
    """``a`` if the condition holds, else ``b``."""
    if isinstance(condition, bool):
        return a if condition else b
    if isinstance(a, int) and isinstance(b, int) and a == b:
        return a
    return solver().If(condition, _vector(a, width), _vector(b, width))


def _vector(a: Number, width: int) -> Any:
    return solver().BitVecVal(a, width) if isinstance(a, int) else a

"""One thing that ``netslot check`` has to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Level: TypeAlias = Literal["error", "warning", "info"]


@dataclass(frozen=True, slots=True)
class Finding:
    """``what`` was found, ``why`` it matters, and the command that mends it (empty where nothing has to be mended).

    error: slots as the spec wants them cannot work. warning: something will bite. info: how it is.
    """

    level: Level
    what: str
    why: str
    fix: str = ""

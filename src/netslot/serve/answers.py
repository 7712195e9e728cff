"""From requests to checked bodies, from results and errors to answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from netslot.errors import NetslotError, RefusedError, UsageError
from netslot.serve.wire import ErrorAnswer

T = TypeVar("T")
_encode = msgspec.json.Encoder().encode


class ForbiddenError(RefusedError):
    """The caller's user may not do this."""


class MissingError(RefusedError):
    """There is no such lease or slot."""


def answer(value: Any, status: int = 200) -> web.Response:
    """``value`` as JSON."""
    return web.Response(body=_encode(value), status=status, content_type="application/json")


async def read_body(request: web.Request, kind: type[T]) -> T:
    """The request's body. UsageError when it is not what the description says."""
    try:
        return msgspec.json.decode(await request.read() or b"{}", type=kind)
    except msgspec.DecodeError as error:
        raise UsageError(f"the body is wrong: {error}", hint="GET /openapi.json describes it") from error


def _status(error: NetslotError) -> int:
    for kind, status in ((ForbiddenError, 403), (MissingError, 404), (RefusedError, 409), (UsageError, 400)):
        if isinstance(error, kind):
            return status
    return 500


@web.middleware
async def refusals(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Errors become JSON; those of aiohttp itself (no such path, wrong method) too."""
    try:
        return await handler(request)
    except NetslotError as error:
        return answer(ErrorAnswer(error.message, error.hint, error.exit_status), _status(error))
    except web.HTTPException as error:
        hint = "GET /openapi.json describes what there is"
        return answer(ErrorAnswer(error.reason, hint, UsageError.exit_status), error.status)

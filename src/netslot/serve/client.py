"""A client of the daemon for programs and the command line; needs nothing but the standard library."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from netslot.errors import HostError, NetslotError, RefusedError, UsageError

_TIMEOUT = 60.0
_ERRORS = {each.exit_status: each for each in (UsageError, RefusedError, HostError)}


def socket_path(state_dir: Path) -> Path:
    """Where the daemon of this state directory listens."""
    return state_dir / "netslot.sock"


def connect(state_dir: Path) -> Client | None:
    """A client of the daemon of this host, or None when none runs. NetslotError when the caller may not use it."""
    client = Client(socket_path(state_dir))
    try:
        client.open()
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        return None
    except PermissionError as error:
        path = socket_path(state_dir)
        raise NetslotError(f"may not use {path}", hint="become a member of the socket's group, or root") from error
    return client


class Client:
    """One connection. Answers are as :mod:`netslot.serve.wire` has them; refusals raise what Python callers of
    :class:`netslot.host.host.Host` get."""

    def __init__(self, path: Path) -> None:
        self._connection = _UnixConnection(str(path))

    def open(self) -> None:
        """Connect; OSError says why not."""
        self._connection.connect()

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def acquire(
        self,
        owner: str,
        *,
        class_name: str | None = None,
        params: Mapping[str, object] | None = None,
        wait: float = 0.0,
        ttl: float | None = None,
        holder_pid: int | None = None,
    ) -> dict[str, Any]:
        """Lease a slot; RefusedError when none is free within ``wait`` seconds."""
        body = {"owner": owner, "class": class_name, "params": dict(params or {}), "wait": wait, "ttl": ttl}
        return self.request("POST", "/v1/leases", body | {"holder_pid": holder_pid}, wait=wait)

    def find(
        self, *, lease: str | None = None, owner: str | None = None, slot: int | None = None
    ) -> dict[str, Any] | None:
        """The lease with this id, of this owner, or of this slot; None when the caller has no such lease."""
        found = self.request("GET", "/v1/leases?" + urlencode(_named(owner, slot)))
        chosen = [each for each in found["leases"] if lease in (None, each["lease"])]
        return chosen[0] if chosen else None

    def update(
        self, lease: str, params: Mapping[str, object] | None = None, *, ttl: float | None = None
    ) -> dict[str, Any]:
        """Change parameters of a running lease, or renew it."""
        return self.request(
            "PATCH", f"/v1/leases/{quote(lease, safe='')}", {"params": dict(params or {}), "ttl": ttl}
        )

    def release(self, lease: str) -> dict[str, Any]:
        """End a lease."""
        return self.request("DELETE", f"/v1/leases/{quote(lease, safe='')}")

    def take_back(self, slot: int) -> dict[str, Any]:
        """Take a slot back whoever holds it; for root."""
        return self.request("DELETE", f"/v1/slots/{slot}")

    def request(self, method: str, path: str, body: object = None, *, wait: float = 0.0) -> dict[str, Any]:
        """One request; errors are raised as the daemon had them."""
        data = None if body is None else json.dumps(body).encode()
        headers = {} if data is None else {"Content-Type": "application/json"}
        try:
            if self._connection.sock is not None:
                self._connection.sock.settimeout(_TIMEOUT + wait)
            self._connection.request(method, path, data, headers)
            response = self._connection.getresponse()
            answer: dict[str, Any] = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise NetslotError(f"the daemon did not answer: {error}", hint="is it still running?") from error
        if response.status >= 400 and "error" in answer:
            kind = _ERRORS.get(answer.get("exit_status", 1), NetslotError)
            raise kind(str(answer.get("error", response.reason)), hint=answer.get("hint"))
        return answer


def _named(owner: str | None, slot: int | None) -> dict[str, str]:
    return ({} if owner is None else {"owner": owner}) | ({} if slot is None else {"slot": str(slot)})


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.settimeout(self.timeout)
        try:
            sock.connect(self._path)
        except OSError:
            sock.close()
            raise
        self.sock = sock

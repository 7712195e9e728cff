"""Who is at the other end of the socket, as the kernel says (unix(7), SO_PEERCRED)."""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass

from aiohttp import web

_UCRED = struct.Struct("iII")


@dataclass(frozen=True, slots=True)
class Peer:
    """A caller. Whoever may open the socket may acquire; a lease is its user's; root may do everything."""

    pid: int
    uid: int
    gid: int

    @property
    def is_admin(self) -> bool:
        return self.uid == 0

    def may_touch(self, uid: int) -> bool:
        """Whether the caller may see and change a lease of user ``uid``."""
        return self.is_admin or self.uid == uid

    def may_name(self, pid: int) -> bool:
        """Whether the caller may make a lease end with process ``pid``: one that runs as the caller's user."""
        if self.is_admin:
            return True
        try:
            return os.stat(f"/proc/{pid}").st_uid == self.uid
        except OSError:
            return False


def peer_of(request: web.Request) -> Peer:
    """The process that opened the connection."""
    assert request.transport is not None
    sock: socket.socket = request.transport.get_extra_info("socket")
    return Peer(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))

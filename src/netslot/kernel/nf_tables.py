"""nf_tables over nfnetlink: dumps as bytes, batches that are done whole or not at all, the generation.

Layouts: linux/netfilter/nf_tables.h and nfnetlink.h. Numbers in attributes are big-endian.
"""

from __future__ import annotations

import errno
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from netslot.errors import HostError, KernelError
from netslot.kernel import netlink
from netslot.kernel.netlink import NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST

NEWTABLE, GETTABLE, DELTABLE = 0, 1, 2
NEWCHAIN, GETCHAIN, DELCHAIN = 3, 4, 5
NEWRULE, GETRULE, DELRULE = 6, 7, 8
NEWSET, GETSET, DELSET = 9, 10, 11
NEWSETELEM, GETSETELEM, DELSETELEM = 12, 13, 14
GETGEN = 16
NEWOBJ, GETOBJ, DELOBJ = 18, 19, 20
NEWFLOWTABLE, GETFLOWTABLE, DELFLOWTABLE = 22, 23, 24

FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
"""nfgenmsg families (NFPROTO_*) by number, in nft's words."""

HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence, port."""

MESSAGE_HEADER_SIZE = HEADER.size + 4
"""Bytes before the attributes of a dumped message: nlmsghdr and nfgenmsg."""

_SUBSYSTEM = 10 << 8  # NFNL_SUBSYS_NFTABLES
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_GEN_ID = 1
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_REMOVING = frozenset({DELTABLE, DELCHAIN, DELRULE, DELSET, DELSETELEM, DELOBJ, DELFLOWTABLE})
_CLOSE_AFTER_S = 0.1
_DEFAULT_SEND_BUFFER = 200_000  # below net.core.wmem_default (212,992) less the kernel's own overhead

CREATE = NLM_F_CREATE
APPEND = NLM_F_CREATE | NLM_F_APPEND
REPLACE = NLM_F_REPLACE


_GENERIC = [struct.pack("=BBH", family, 0, 0) for family in range(256)]


def generic_header(family: int) -> bytes:
    """struct nfgenmsg with version 0 and no resource."""
    return _GENERIC[family]


def kind(message: int) -> int:
    """The netlink type of an nf_tables message."""
    return _SUBSYSTEM | message


@dataclass(frozen=True, slots=True)
class Command:
    """One message of a batch. ``payload`` is attributes only; ``operation`` names it in errors."""

    message: int
    family: int
    flags: int
    payload: bytes
    operation: str | Callable[[], str]


class Batch:
    """Commands as the bytes of one transaction, sent as often as wanted; sequence numbers count from 1."""

    def __init__(self, commands: Sequence[Command]) -> None:
        self._commands = commands
        begin = generic_header(0)[:2] + struct.pack(">H", 10)
        parts = [netlink.message(_BATCH_BEGIN, NLM_F_REQUEST, begin, 0)]
        last = len(commands)
        for seq, command in enumerate(commands, 1):
            # Errors are always answered; one acknowledgement, of the last command, says that all were tried.
            flags = command.flags | NLM_F_REQUEST | (NLM_F_ACK if seq == last else 0)
            length = len(command.payload) + MESSAGE_HEADER_SIZE
            parts.append(HEADER.pack(length, _SUBSYSTEM | command.message, flags, seq, 0))
            parts.append(generic_header(command.family))
            parts.append(command.payload)
        parts.append(netlink.message(_BATCH_END, NLM_F_REQUEST, begin, last + 1))
        self.data = b"".join(parts)
        self.last = last
        self.removes = any(c.message in _REMOVING or c.flags & NLM_F_REPLACE for c in commands)

    def operation(self, seq: int) -> str:
        """What the command with this sequence number does; 0 is the transaction as a whole."""
        if not 1 <= seq <= self.last:
            return "nf_tables: commit"
        name = self._commands[seq - 1].operation
        return name if isinstance(name, str) else name()


class Socket(netlink.Socket):
    """An nfnetlink socket of the namespace that the calling thread is in when it is made."""

    def __init__(self) -> None:
        super().__init__(netlink.NETLINK_NETFILTER)

    def close(self) -> None:
        """Close the socket; a little later, on another thread, when something was removed just now.

        Closing any nfnetlink socket makes the kernel wait until what was removed in that namespace is freed
        (nf_tables_api.c: nft_rcv_nl_event), which takes an RCU grace period or several: 8 to 60 ms measured.
        """
        if _Closer.removed_lately():
            _Closer.put(self._socket)
        else:
            super().close()

    def commit(self, batch: Batch) -> None:
        """Send a batch and wait for it. KernelError names the command that the kernel refused; nothing is done then.

        HostError when the batch is larger than this user may send at once.
        """
        if not batch.last:
            return
        if len(batch.data) > _DEFAULT_SEND_BUFFER:
            self._make_room(len(batch.data))
        if batch.removes:
            _Closer.last_removal = time.monotonic()
        self._send(batch.data, "nf_tables: send a batch")
        failure: KernelError | None = None
        while True:
            for reply in netlink.split(self._receive("nf_tables: commit")):
                if reply.type != netlink.NLMSG_ERROR:
                    continue
                error = -struct.unpack_from("=i", reply.payload)[0]
                if error and failure is None:
                    failure = KernelError(batch.operation(reply.seq), error, detail=netlink.extended_ack(reply))
                if reply.seq in (0, batch.last) or (error and reply.seq > batch.last):
                    if failure:
                        raise failure
                    return

    def _make_room(self, size: int) -> None:
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 2 * size)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 20)
        except PermissionError as error:
            raise HostError(
                f"a batch of {size} bytes does not fit a socket buffer that this user may have",
                hint="raise net.core.wmem_max, or run with CAP_NET_ADMIN in the initial user namespace",
            ) from error

    def dump_bytes(self, message: int, family: int, attributes: bytes, operation: str) -> bytes:
        """All answers to a dump request as one string of netlink messages, without the closing one.

        Repeated when the kernel says that the ruleset changed under the dump. b"" when there is no such object.
        """
        while True:
            self._seq = seq = (self._seq + 1) & 0x7FFFFFFF
            flags = NLM_F_REQUEST | NLM_F_DUMP
            length = len(attributes) + MESSAGE_HEADER_SIZE
            header = HEADER.pack(length, _SUBSYSTEM | message, flags, seq, 0)
            self._send(header + generic_header(family) + attributes, operation)
            answer = self._collect(seq, operation)
            if answer is not None:
                return answer

    def _collect(self, seq: int, operation: str) -> bytes | None:
        """The messages of one dump; None when it was interrupted and must be repeated."""
        parts: list[bytes] = []
        while True:
            data = self._receive(operation)
            _, first, flags, found, _ = HEADER.unpack_from(data)
            if found != seq:
                continue  # left over from a request that was given up
            if first == netlink.NLMSG_ERROR:
                error = -struct.unpack_from("=i", data, HEADER.size)[0]
                if error == errno.ENOENT:
                    return b""
                reply = next(netlink.split(data))
                raise KernelError(operation, error, detail=netlink.extended_ack(reply))
            # The closing message ends the last datagram: 16 bytes of header, 4 of status.
            size, closing, end_flags, end_seq, _ = HEADER.unpack_from(data, len(data) - 20)
            if size == 20 and closing == netlink.NLMSG_DONE and end_seq == seq:
                status = -struct.unpack_from("=i", data, len(data) - 4)[0]
                if status > 0:
                    raise KernelError(operation, status)
                parts.append(data[:-20])
                return None if (flags | end_flags) & netlink.NLM_F_DUMP_INTR else b"".join(parts)
            parts.append(data)

    def generation(self) -> int:
        """The number of the namespace's ruleset: every committed transaction makes it another one.

        What packets and time do (counters, elements of dynamic sets, expiry) does not change it, nor does the
        end of a device that a netdev chain hangs on (nf_tables_api.c: base_seq is raised in nf_tables_commit).
        """
        answer = self.execute(
            [netlink.Request(_SUBSYSTEM | GETGEN, 0, generic_header(0), "nf_tables: read the generation")]
        )
        return int.from_bytes(netlink.parse_attrs(answer[0].payload, 4)[_GEN_ID], "big")


class _Closer:
    """A thread that closes sockets when the kernel has forgotten why it would have to wait."""

    _queue: queue.SimpleQueue[tuple[float, socket.socket]] = queue.SimpleQueue()
    _lock = threading.Lock()
    _thread: threading.Thread | None = None
    last_removal = -_CLOSE_AFTER_S
    """When a socket of this process last sent a batch that removes something, by the monotonic clock."""

    @classmethod
    def removed_lately(cls) -> bool:
        return time.monotonic() - cls.last_removal < _CLOSE_AFTER_S

    @classmethod
    def put(cls, sock: socket.socket) -> None:
        with cls._lock:
            # A child of fork has the queue but not the thread.
            if cls._thread is None or not cls._thread.is_alive():
                cls._thread = threading.Thread(target=cls._serve, name="netslot-closer", daemon=True)
                cls._thread.start()
        cls._queue.put((time.monotonic() + _CLOSE_AFTER_S, sock))

    @classmethod
    def _serve(cls) -> None:
        while True:
            due, sock = cls._queue.get()
            time.sleep(max(0.0, due - time.monotonic()))
            sock.close()


def split(data: bytes) -> Iterable[tuple[int, bytes]]:
    """Family and attributes of every message of a dump."""
    for message in netlink.split(data):
        yield message.payload[0], message.payload[4:]

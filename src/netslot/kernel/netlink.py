"""Netlink: messages as bytes, and a socket that sends batches and reports the one that failed.

Layouts: linux/netlink.h. Everything is native-endian; attributes are padded to 4 bytes.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Self

from netslot.errors import KernelError

NLM_F_REQUEST = 0x01
NLM_F_MULTI = 0x02
NLM_F_ACK = 0x04
NLM_F_ECHO = 0x08
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800
NLM_F_DUMP = 0x300
NLM_F_DUMP_INTR = 0x10

NLMSG_NOOP = 1
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLMSG_MIN_TYPE = 0x10

NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF

NETLINK_ROUTE = 0
NETLINK_SOCK_DIAG = 4
NETLINK_NETFILTER = 12

SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP = 1
NETLINK_EXT_ACK = 11
NETLINK_CAP_ACK = 10
NETLINK_GET_STRICT_CHK = 12

_NLMSGHDR = struct.Struct("=IHHII")
_NLATTR = struct.Struct("=HH")
_U32 = struct.Struct("=I")
_PAD = (b"", b"\0\0\0", b"\0\0", b"\0")
_NLM_F_CAPPED = 0x100
_NLM_F_ACK_TLVS = 0x200
_NLMSGERR_ATTR_MSG = 1

_PREPARED_SEQ = 0x40000000

_PATIENCE = struct.pack("ll", 60, 0)  # struct timeval: seconds after which an answer will not come any more

HEADER_SIZE = _NLMSGHDR.size

# The kernel fills at most 32 KiB at a time (af_netlink.c, netlink_recvmsg). A buffer of 128 KiB and more would be
# mapped and unmapped at every call, which costs more than the call.
_RECEIVE = 1 << 16


class Message(NamedTuple):
    """One received message; ``payload`` is everything behind the netlink header."""

    type: int
    flags: int
    seq: int
    payload: bytes


def attr(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    return _NLATTR.pack(len(value) + 4, kind) + value + _PAD[len(value) & 3]


def attr_u8(kind: int, value: int) -> bytes:
    return attr(kind, struct.pack("=B", value))


def attr_u16(kind: int, value: int) -> bytes:
    return attr(kind, struct.pack("=H", value))


def attr_u32(kind: int, value: int) -> bytes:
    return attr(kind, struct.pack("=I", value))


def attr_be32(kind: int, value: int) -> bytes:
    return attr(kind, struct.pack(">I", value))


def attr_str(kind: int, value: str) -> bytes:
    """A NUL-terminated string attribute."""
    return attr(kind, value.encode() + b"\0")


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute that holds attributes, marked NLA_F_NESTED."""
    return attr(kind | NLA_F_NESTED, b"".join(attributes))


def parse_attrs(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """Attributes by type, without the nested and byte-order flags; the last one of a type wins."""
    return dict(iter_attrs(data, offset))


def iter_attrs(data: bytes, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Attributes in order, for lists in which a type repeats."""
    end = len(data)
    while offset + 4 <= end:
        length, kind = _NLATTR.unpack_from(data, offset)
        if length < 4:
            return
        yield kind & NLA_TYPE_MASK, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def message(kind: int, flags: int, payload: bytes, seq: int = 0) -> bytes:
    """One message with its header; ``payload`` must already be padded to 4 bytes."""
    return _NLMSGHDR.pack(len(payload) + 16, kind, flags, seq, 0) + payload


def split(datagram: bytes) -> Iterator[Message]:
    """The messages of one datagram."""
    offset, end = 0, len(datagram)
    while offset + 16 <= end:
        length, kind, flags, seq, _ = _NLMSGHDR.unpack_from(datagram, offset)
        yield Message(kind, flags, seq, datagram[offset + 16 : offset + length])
        offset += (length + 3) & ~3


class Request(NamedTuple):
    """A message to send. ``operation`` names it in errors; ``ignore`` lists errnos that count as success."""

    kind: int
    flags: int
    payload: bytes
    operation: str
    ignore: tuple[int, ...] = ()


class Prepared:
    """Requests as the bytes of one datagram, to be sent more than once; see :meth:`Socket.repeat`.

    The last four bytes of each message may be another number each time.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        last = len(requests) - 1
        # Far from the numbers that execute() counts up, so that no answer is taken for another's.
        self.by_seq = {_PREPARED_SEQ + place: request for place, request in enumerate(requests)}
        self.last = _PREPARED_SEQ + last
        parts = [
            message(r.kind, r.flags | NLM_F_REQUEST | (NLM_F_ACK if seq == self.last else 0), r.payload, seq)
            for seq, r in self.by_seq.items()
        ]
        ends = itertools.accumulate(map(len, parts))
        self.tails = [end - 4 for end in ends]
        self.data = b"".join(parts)


class Socket:
    """A netlink socket of the namespace that the calling thread is in when it is made.

    It stays in that namespace whatever thread uses it later. One user at a time.
    """

    def __init__(self, protocol: int = NETLINK_ROUTE, *, receive_buffer: int = 0) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        except OSError as error:
            raise KernelError("socket AF_NETLINK", error.errno or errno.EIO) from error
        self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _PATIENCE)
        if receive_buffer:
            so_rcvbufforce = 33
            self._socket.setsockopt(socket.SOL_SOCKET, so_rcvbufforce, receive_buffer)
        self._seq = 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def join(self, group: int) -> None:
        """Receive the notifications of a multicast group; see netlink(7)."""
        if not self._socket.getsockname()[0]:
            self._socket.bind((0, 0))  # a socket without an address is left out
        self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)

    def strict(self) -> None:
        """Have the kernel check and apply filters in dump requests (NETLINK_GET_STRICT_CHK, Linux 4.20)."""
        self._socket.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)

    def receive(self, timeout: float | None = None) -> list[Message]:
        """The messages of the next datagram; [] when ``timeout`` seconds pass without one."""
        self._socket.settimeout(timeout)
        try:
            return list(split(self._socket.recv(_RECEIVE)))
        except TimeoutError:
            return []
        finally:
            self._socket.settimeout(None)

    def execute(self, requests: Iterable[Request]) -> list[Message]:
        """Send all requests in one datagram and wait until the kernel has done them.

        Every request is tried, also after one that failed, as the kernel does. Returns the messages
        that NLM_F_ECHO or a GET asked for. Raises KernelError for the first failure, with its operation.
        """
        batch: dict[int, Request] = {}
        parts: list[bytes] = []
        for request in requests:
            self._seq = seq = (self._seq + 1) & 0x7FFFFFFF
            batch[seq] = request
            parts.append(message(request.kind, request.flags | NLM_F_REQUEST, request.payload, seq))
        if not batch:
            return []
        last = seq
        # Errors are always answered; one acknowledgement, of the last message, says that all were tried.
        final = batch[last]
        parts[-1] = message(final.kind, final.flags | NLM_F_REQUEST | NLM_F_ACK, final.payload, last)
        self._send(b"".join(parts), final.operation)
        return self._answers(batch, last)

    def repeat(self, prepared: Prepared, numbers: Mapping[int, int]) -> None:
        """As :meth:`execute`, with ``numbers`` put into the ends of messages, by the messages' places."""
        data = bytearray(prepared.data)
        for place, number in numbers.items():
            _U32.pack_into(data, prepared.tails[place], number)
        self._send(data, prepared.by_seq[prepared.last].operation)
        self._answers(prepared.by_seq, prepared.last)

    def _answers(self, batch: Mapping[int, Request], last: int) -> list[Message]:
        """What the kernel says to a datagram, up to the answer to its last message."""
        operation = batch[last].operation
        failure: KernelError | None = None
        answers: list[Message] = []
        while True:
            for reply in split(self._receive(operation)):
                failed = batch.get(reply.seq)
                if failed is None:
                    continue  # an answer to a batch that was given up
                if reply.type != NLMSG_ERROR:
                    answers.append(reply)
                    continue
                error = -struct.unpack_from("=i", reply.payload)[0]
                if error and error not in failed.ignore and failure is None:
                    failure = KernelError(failed.operation, error, detail=extended_ack(reply))
                if reply.seq == last:
                    if failure:
                        raise failure
                    return answers

    def dump(self, kind: int, payload: bytes, operation: str) -> list[Message]:
        """All answers to a dump request; repeated when the kernel says that it was interrupted."""
        while True:
            self._seq = seq = (self._seq + 1) & 0x7FFFFFFF
            self._send(message(kind, NLM_F_REQUEST | NLM_F_DUMP, payload, seq), operation)
            answers: list[Message] = []
            interrupted = False
            done = False
            while not done:
                for reply in split(self._receive(operation)):
                    if reply.seq != seq:
                        continue
                    interrupted |= bool(reply.flags & NLM_F_DUMP_INTR)
                    if reply.type == NLMSG_DONE or reply.type == NLMSG_ERROR:
                        status = struct.unpack_from("=i", reply.payload)[0] if len(reply.payload) >= 4 else 0
                        if status < 0:
                            raise KernelError(operation, -status, detail=extended_ack(reply))
                        done = True
                        break
                    answers.append(reply)
            if not interrupted:
                return answers

    def _send(self, data: bytes | bytearray, operation: str) -> None:
        try:
            self._socket.send(data)
        except OSError as error:
            raise KernelError(operation, error.errno or errno.EIO) from error

    def _receive(self, operation: str) -> bytes:
        try:
            return self._socket.recv(_RECEIVE)
        except BlockingIOError as error:
            raise KernelError(operation, errno.ETIMEDOUT, detail="the kernel did not answer") from error
        except OSError as error:
            raise KernelError(operation, error.errno or errno.EIO) from error


_here = threading.local()


@contextlib.contextmanager
def lent(sock: Socket) -> Iterator[None]:
    """Let :func:`here` give ``sock`` to whoever asks on this thread, for the length of the block.

    Making a socket and closing it costs as much as a request. The thread must stay in the socket's namespace.
    """
    _here.socket = sock
    try:
        yield
    finally:
        _here.socket = None


@contextlib.contextmanager
def here() -> Iterator[Socket]:
    """A route netlink socket of the namespace that the calling thread is in: the one that is lent, or a new one."""
    borrowed: Socket | None = getattr(_here, "socket", None)
    if borrowed is not None:
        yield borrowed
        return
    with Socket() as own:
        yield own


def extended_ack(reply: Message) -> str | None:
    """``Invalid argument (the kernel's own sentence)`` of an error reply, when the kernel gave a sentence."""
    if not reply.flags & _NLM_F_ACK_TLVS:
        return None
    offset = 4
    if reply.type == NLMSG_ERROR:
        inner = 16 if reply.flags & _NLM_F_CAPPED else struct.unpack_from("=I", reply.payload, 4)[0]
        offset = 4 + ((inner + 3) & ~3)
    text = parse_attrs(reply.payload, offset).get(_NLMSGERR_ATTR_MSG)
    if text is None:
        return None
    error = -struct.unpack_from("=i", reply.payload)[0]
    return f"{os.strerror(error)} ({text.rstrip(bytes(1)).decode(errors='replace')})"

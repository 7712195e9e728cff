"""The time that a host adds to a connection: TCP connect and UDP round trip from guests to a server outside.

Client and server are sockets of one thread. The kernel carries a packet through all namespaces in the context
of the system call that sends it, so no process waits for another and no scheduler is part of a figure. What is
timed is the walk of the packets: SYN, SYN-ACK and ACK through the host, or a datagram each way.
"""

from __future__ import annotations

import gc
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from netslot.bench.field import Guest
from netslot.bench.statistics import percentile
from netslot.bench.tenants import SERVER
from netslot.errors import NetslotError
from netslot.kernel import netns

_TCP, _UDP = (SERVER, 8080), (SERVER, 7777)
_WARM_UPS = 3
_DENIED_UDP = (SERVER, 11211)  # the tenants' rules drop this port
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # no TIME_WAIT: thousands of connections share one pair of addresses
_PATIENCE = struct.pack("ll", 3, 0)


@dataclass(slots=True)
class Samples:
    """Times in µs of one guest under one shape."""

    tcp_us: list[float] = field(default_factory=list)
    udp_us: list[float] = field(default_factory=list)

    def summary(self, slot: int) -> dict[str, object]:
        """``{"slot", "p50_us", "p99_us", "udp_p50_us", "udp_p99_us", "samples"}``; ``p50_us`` is of TCP connects."""
        return {
            "slot": slot,
            "p50_us": round(percentile(self.tcp_us, 0.5), 2),
            "p99_us": round(percentile(self.tcp_us, 0.99), 2),
            "udp_p50_us": round(percentile(self.udp_us, 0.5), 2),
            "udp_p99_us": round(percentile(self.udp_us, 0.99), 2),
            "samples": len(self.tcp_us),
        }


class Client:
    """Connects from any guest to one server; made and used on one :class:`netns.Worker` thread."""

    def __init__(self) -> None:
        outside = netns.open_named("outside")
        with netns.entered(outside):
            self._listener = socket.create_server(_TCP, backlog=64)
            self._receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._denied = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        os.close(outside)
        self._receiver.bind(_UDP)
        self._denied.bind(_DENIED_UDP)
        self._denied.setblocking(False)
        for sock in (self._listener, self._receiver):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _PATIENCE)

    def close(self) -> None:
        self._listener.close()
        self._receiver.close()
        self._denied.close()

    def lets_denied_through(self, guest: Guest) -> bool:
        """Whether a datagram that the tenants' rules forbid reaches the server."""
        with netns.entered(guest.netns), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _PATIENCE)
            # The first waits for neighbours to be resolved where that is needed; the second is there when sent.
            self.udp_round_trip_us(guest)
            sock.sendto(b"denied", _DENIED_UDP)
        try:
            self._denied.recv(64)
        except BlockingIOError:
            return False
        return True

    def tcp_connect_us(self, guest: Guest) -> float:
        """The duration of one connect(2)."""
        with netns.entered(guest.netns):
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _PATIENCE)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            start = time.perf_counter_ns()
            sock.connect(_TCP)
            took = time.perf_counter_ns() - start
            self._listener.accept()[0].close()
        except OSError as error:
            raise _no_way(guest, "TCP", error) from error
        finally:
            sock.close()
        return took / 1e3

    def udp_round_trip_us(self, guest: Guest) -> float:
        """The duration of a datagram of 16 bytes and its answer, on a flow that the host has not seen before."""
        with netns.entered(guest.netns):
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _PATIENCE)
            sock.connect(_UDP)
            payload = b"0123456789abcdef"
            receiver = self._receiver
            start = time.perf_counter_ns()
            sock.send(payload)
            received, sender = receiver.recvfrom(64)
            receiver.sendto(received, sender)
            sock.recv(64)
            took = time.perf_counter_ns() - start
        except OSError as error:
            raise _no_way(guest, "UDP", error) from error
        finally:
            sock.close()
        return took / 1e3

    def block(
        self,
        guests: Sequence[Guest],
        samples: Sequence[Samples],
        count: int,
        dice: random.Random,
        *,
        least: int,
        budget_s: float,
    ) -> None:
        """Take ``count`` more samples of every guest, in an order that is shuffled anew for each round.

        Where that takes longer than ``budget_s``, the block ends early, but not before ``least`` samples.
        """
        order = list(range(len(guests)))
        for guest in [*guests] * _WARM_UPS:  # routes, neighbours and caches of this guest's way
            self.tcp_connect_us(guest)
            self.udp_round_trip_us(guest)
        gc.disable()
        try:
            end = time.monotonic() + budget_s
            for done in range(count):
                if done >= least and time.monotonic() > end:
                    break
                dice.shuffle(order)
                for which in order:
                    samples[which].tcp_us.append(self.tcp_connect_us(guests[which]))
                for which in order:
                    samples[which].udp_us.append(self.udp_round_trip_us(guests[which]))
        finally:
            gc.enable()


def _no_way(guest: Guest, protocol: str, error: OSError) -> NetslotError:
    return NetslotError(
        f"guest {guest.slot}: no {protocol} answer from the server outside: {error.strerror}",
        hint="the shape's rules do not let the measured flow through; this is a mistake in the benchmark",
    )


def pin_thread() -> int:
    """Keep the calling thread on one processor, the last that it may use; return its number."""
    chosen = max(os.sched_getaffinity(0))
    os.sched_setaffinity(threading.get_native_id(), {chosen})
    return chosen

"""What goes over the socket: bodies of requests and answers, and the list of operations.

The description at ``/openapi.json`` is made from these, the daemon's routes too, so neither can forget the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
from msgspec import Meta

Seconds = Annotated[float, Meta(ge=0)]
ParameterValue = str | int | list[str]


class AcquireBody(msgspec.Struct, forbid_unknown_fields=True, rename={"class_name": "class"}):
    """Ask for a slot. ``holder_pid`` names a process of the caller's own; the lease ends with it."""

    owner: Annotated[str, Meta(min_length=1, max_length=200)]
    class_name: str | None = None
    params: dict[str, ParameterValue] = {}
    wait: Seconds = 0.0
    ttl: Seconds | None = None
    holder_pid: Annotated[int, Meta(gt=0)] | None = None


class UpdateBody(msgspec.Struct, forbid_unknown_fields=True):
    """Change parameters, those named; with ``ttl``, let the lease end that many seconds from now (a heartbeat)."""

    params: dict[str, ParameterValue] = {}
    ttl: Seconds | None = None
    holder_pid: Annotated[int, Meta(gt=0)] | None = None


class VerifyBody(msgspec.Struct, forbid_unknown_fields=True):
    """What to verify: these slots, or all; ``repair`` puts right what is netslot's own."""

    slots: list[int] | None = None
    repair: bool = False


class FirecrackerInterface(msgspec.Struct):
    """A body for Firecracker's ``PUT /network-interfaces/{iface_id}``."""

    iface_id: str
    host_dev_name: str
    guest_mac: str


class LeaseAnswer(msgspec.Struct, rename={"class_name": "class"}):
    """A lease and all that is needed to attach a workload. Times are ISO 8601."""

    slot: int
    class_name: str
    owner: str
    lease: str
    params: dict[str, ParameterValue]
    acquired_at: str
    expires_at: str | None
    netns: str
    netns_path: str
    attachment: str
    tap: str | None
    guest_address: str
    gateway: str
    prefix_length: int
    slot_address: str
    guest_mac: str
    gateway_mac: str
    mtu: int
    cgroup: str | None
    dns: list[str]
    guest_address6: str | msgspec.UnsetType = msgspec.UNSET
    gateway6: str | msgspec.UnsetType = msgspec.UNSET
    slot_address6: str | msgspec.UnsetType = msgspec.UNSET
    workload_netns: str | msgspec.UnsetType = msgspec.UNSET
    workload_netns_path: str | msgspec.UnsetType = msgspec.UNSET
    kernel_ip_argument: str | msgspec.UnsetType = msgspec.UNSET
    firecracker: FirecrackerInterface | msgspec.UnsetType = msgspec.UNSET


class LeasesAnswer(msgspec.Struct):
    """The caller's leases; everybody's for root."""

    leases: list[LeaseAnswer]


class ReleaseAnswer(msgspec.Struct):
    """The slot is cleaned behind the scenes and handed out again only then."""

    slot: int
    released: bool


class SlotAnswer(msgspec.Struct, rename={"class_name": "class"}):
    """One slot. ``owner`` is shown to the lease's user and to root."""

    slot: int
    netns: str
    netns_path: str
    address: str
    state: str
    class_name: str
    owner: str | msgspec.UnsetType = msgspec.UNSET
    reason: str | msgspec.UnsetType = msgspec.UNSET


class SlotsAnswer(msgspec.Struct):
    """All slots by number."""

    slots: list[SlotAnswer]


class DriftAnswer(msgspec.Struct):
    """One difference."""

    where: str
    what: str


class VerifyAnswer(msgspec.Struct):
    """``repaired`` counts places: slots, and the root. ``seconds`` is how long it took."""

    slots: int
    checked: int
    drift: list[DriftAnswer]
    repaired: int
    unrepaired: int
    seconds: float


class HealthAnswer(msgspec.Struct):
    """``reloading`` while a spec is put in force; ``problem`` is what the last background work failed with."""

    ok: bool
    reloading: bool
    free: int
    leased: int
    problem: str | None


class ErrorAnswer(msgspec.Struct):
    """``exit_status`` is what the command line would have ended with."""

    error: str
    hint: str | None
    exit_status: int


@dataclass(frozen=True)
class Operation:
    """One operation: ``name`` is the handler's; ``answers`` holds the body's type by HTTP status, None for text."""

    method: str
    path: str
    name: str
    summary: str
    answers: dict[int, Any]
    body: Any = None
    queries: dict[str, str] = field(default_factory=dict)


_REFUSALS: dict[int, Any] = {400: ErrorAnswer, 403: ErrorAnswer}
_MISSING: dict[int, Any] = {404: ErrorAnswer}

OPERATIONS = (
    Operation(
        "POST",
        "/v1/leases",
        "acquire",
        "Lease a slot; 201 for a new lease, 200 for the one that the owner holds, 409 when none is free.",
        {200: LeaseAnswer, 201: LeaseAnswer, 409: ErrorAnswer, **_REFUSALS},
        body=AcquireBody,
    ),
    Operation(
        "GET",
        "/v1/leases",
        "leases",
        "The caller's leases.",
        {200: LeasesAnswer},
        queries={"owner": "Only this owner's.", "slot": "Only this slot's."},
    ),
    Operation("GET", "/v1/leases/{lease}", "lease", "One lease.", {200: LeaseAnswer, 403: ErrorAnswer, **_MISSING}),
    Operation(
        "PATCH",
        "/v1/leases/{lease}",
        "update",
        "Change a running lease's parameters, or renew it.",
        {200: LeaseAnswer, 409: ErrorAnswer, **_REFUSALS, **_MISSING},
        body=UpdateBody,
    ),
    Operation(
        "POST",
        "/v1/leases/{lease}/renew",
        "renew",
        "Heartbeat: the lease ends `ttl` seconds from now.",
        {200: LeaseAnswer, **_REFUSALS, **_MISSING},
        body=UpdateBody,
    ),
    Operation(
        "DELETE", "/v1/leases/{lease}", "release", "End a lease.", {200: ReleaseAnswer, 403: ErrorAnswer, **_MISSING}
    ),
    Operation(
        "GET", "/v1/slots", "slots", "All slots.", {200: SlotsAnswer}, queries={"state": "Only in this state."}
    ),
    Operation("GET", "/v1/slots/{slot}", "slot", "One slot.", {200: SlotAnswer, 400: ErrorAnswer, **_MISSING}),
    Operation(
        "DELETE",
        "/v1/slots/{slot}",
        "take_back",
        "Take a slot back whoever holds it, also one of state unknown (root only).",
        {200: ReleaseAnswer, **_REFUSALS, **_MISSING},
    ),
    Operation(
        "POST",
        "/v1/verify",
        "verify",
        "Compare the kernel with what it should hold (root only).",
        {200: VerifyAnswer, **_REFUSALS},
        body=VerifyBody,
    ),
    Operation(
        "GET", "/healthz", "health", "Whether the daemon can lease slots.", {200: HealthAnswer, 503: HealthAnswer}
    ),
    Operation(
        "GET",
        "/metrics",
        "metrics",
        "Figures in Prometheus form.",
        {200: None, **_MISSING},
        queries={"slot": "Also packets and drops of this slot's uplink."},
    ),
    Operation("GET", "/openapi.json", "openapi", "This description.", {200: dict}),
)

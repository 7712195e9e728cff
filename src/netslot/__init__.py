"""netslot: every tenant's rules in the tenant's own network namespace; a root ruleset that never changes.

>>> from netslot import Host                                   # doctest: +SKIP
>>> with Host() as host, host.acquire("vm-1") as lease:        # doctest: +SKIP
...     print(lease.netns, lease.fields["tap"])
"""

from netslot.errors import HostError, KernelError, NetslotError, RefusedError, SpecError, UsageError
from netslot.host.host import Host, Slot
from netslot.host.leasing import Lease
from netslot.host.verifying import Report

__all__ = [
    "Host",
    "HostError",
    "KernelError",
    "Lease",
    "NetslotError",
    "RefusedError",
    "Report",
    "Slot",
    "SpecError",
    "UsageError",
]

"""The facts of a machine that a figure depends on."""

from __future__ import annotations

import gzip
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path

_TOOLS = (
    ("iptables-legacy", "--version"),
    ("iptables-nft", "--version"),
    ("nft", "--version"),
    ("ip", "-V"),
)


def facts() -> dict[str, object]:
    """Kernel, processor, cores, memory, HZ (None when the kernel does not tell), versions of the tools."""
    return {
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        "hz": kernel_hz(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "tools": {tool: _version(tool, option) for tool, option in _TOOLS},
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def kernel_hz() -> int | None:
    """The kernel's tick rate, from the configuration that it carries or that stands in /boot."""
    for path, opener in (
        (Path("/proc/config.gz"), gzip.open),
        (Path(f"/boot/config-{platform.release()}"), open),
    ):
        if path.exists():
            with opener(path, "rt", encoding="ascii") as config:
                found = re.search(r"^CONFIG_HZ=(\d+)$", config.read(), re.MULTILINE)
            if found:
                return int(found[1])
    return None


def memory_kib(*fields: str) -> int:
    """The sum of fields of /proc/meminfo, in KiB."""
    with open("/proc/meminfo", encoding="ascii") as meminfo:
        values = dict(line.split(":", 1) for line in meminfo)
    return sum(int(values[field].split()[0]) for field in fields)


def wait_until_quiet(limit_s: float = 300.0) -> float:
    """Wait until the kernel has cleaned up dead namespaces; return the seconds that it took.

    The clean-up runs in the background and holds the locks that building needs. It gives back slab memory
    all the time it works, so it is over when slab memory has stopped falling for two seconds.
    """
    start = time.monotonic()
    lowest = memory_kib("SUnreclaim")
    since = start
    while time.monotonic() - since < 2.0 and time.monotonic() - start < limit_s:
        time.sleep(0.25)
        now = memory_kib("SUnreclaim")
        if now < lowest - 512:
            lowest, since = now, time.monotonic()
    return time.monotonic() - start


def _cpu_model() -> str | None:
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as cpuinfo:
        for line in cpuinfo:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return None


def _version(tool: str, option: str) -> str | None:
    if shutil.which(tool) is None:
        return None
    answer = subprocess.run([tool, option], capture_output=True, text=True, check=False)
    return (answer.stdout or answer.stderr).strip()

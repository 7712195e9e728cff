"""What a move costs per tenant: ``python tests/measure_migrate.py 100 1000`` (root; namespaces of its own).

Prints, for each number of tenants, what ``migrate`` takes forward and back by the clock, what it costs of processors
(its children's too; that does not change when others use them as well), and how many processes it started.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from pathlib import Path

from leftovers import private_run
from migration_lab import played_host, split_host
from netslot.host.migrate import Migration


def measure(tenants: int) -> None:
    started = 0

    def count(event: str, _: tuple[object, ...]) -> None:
        nonlocal started
        started += event == "subprocess.Popen"

    with played_host(tenants) as host, tempfile.TemporaryDirectory() as directory:
        files = split_host(host).files
        homes = {name: home.name for name, home in host.homes.items()}
        sys.addaudithook(count)
        spent: dict[str, tuple[float, float, int]] = {}
        for label in ("forward", "back"):
            started = 0
            begin, cpu = time.perf_counter(), sum(os.times()[:4])
            migration = Migration(Path(directory), host.root.fd)
            if label == "forward":
                migration.forward(files, homes, None, lambda _: None)
            else:
                migration.rollback(lambda _: None)
            spent[label] = time.perf_counter() - begin, sum(os.times()[:4]) - cpu, started
    parts = [
        f"{label} {total:.2f} s, of processors {cpu:.2f} s ({cpu / tenants * 1e3:.2f} ms a tenant), {count} processes"
        for label, (total, cpu, count) in spent.items()
    ]
    print(f"{tenants} tenants: {'; '.join(parts)}", flush=True)


if __name__ == "__main__":
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    private_run.__wrapped__()  # type: ignore[attr-defined]
    for number in sys.argv[1:] or ("100", "1000"):
        measure(int(number))

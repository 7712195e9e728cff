"""Every test here runs with a ``/run`` of its own and leaves nothing behind."""

from leftovers import nothing_left, private_run

__all__ = ["nothing_left", "private_run"]

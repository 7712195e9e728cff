"""The kinds of per-slot kernel state. Each module casts a template into a die; see :mod:`netslot.policy.base`."""

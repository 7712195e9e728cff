"""What a host pays: skew between tenants, the cost of a slot, leases. Everything plays a host of its own.

Measurements run on a :mod:`netslot.bench.stage`: a child process with namespaces of its own, which go with it.
"""

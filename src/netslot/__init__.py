"""netslot: every tenant's rules in the tenant's own network namespace."""

"""One host: its root ruleset, its slots' lives, who holds which slot, and whether anything drifted."""

"""The analyst: reads rulesets in iptables-save form, says who owns which rule, and what that costs.

Pure: nothing in this room touches the kernel or a file. Callers hand in text and get values back.

    parse      text in iptables-save form -> Dump (one Ruleset per address family)
    model      Ruleset, Table, Chain, Rule; their parts in matches and targets
    write      a Ruleset, or one match or target, back to text that iptables-restore loads
    attribute  which tenant each rule belongs to; tenants that differ only in names form a class
    audit      how many rules a packet meets, dead and unreachable rules, distance to limits
"""

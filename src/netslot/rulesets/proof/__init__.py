"""The prover: what a packet meets before and after a split, and whether that is the same for every packet.

terms        numbers and truths that may be known, or unknown to be solved for
flow         one packet (concrete or symbolic) as the hooks see it
conditions   whether a match holds for it
walker       one hook of one table: rules in order, jumps, marks, verdicts
places       who is where: tenants, their links and addresses, the host's own
tagged       a ruleset filed by the tenants that its rules name
journey      the hooks of a whole way, before (root) and after (slot, veth, root, slot)
arrangement  what a directory that ``split`` wrote says the world will be
members      which tenants are renamings of each other, before and after
scenarios    the ways that packets can take between representatives
prover       puts the questions to the solver and checks its answers on the whole ruleset
"""

"""The splitter: from a host's ruleset to a static root ruleset and one template per class of tenants.

plan        what is to become of each rule, collected while the parts below decide
naming      a tenant's names and addresses as variables; links as one pattern
slots       the slot's own rules: root's FORWARD, as one tenant's packets meet it
merging     rules of many tenants that say the same, as one rule that names none
publishing  published ports as one rule with a map
rooting     the root ruleset that remains
gathering   rules that differ in addresses and ports only, put together without a change of verdict
sets        the root ruleset of a host whose tenants share links: such rules as one rule and a set
"""

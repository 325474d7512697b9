"""Adapters to other trainers: each goes through a hook that the host documents, or through one named symbol.

An adapter checks its host's version and signatures before it changes anything, and raises on what it does not know.
`fastgrpo.integrations.contracts.installed()` lists the hosts on this machine.
"""

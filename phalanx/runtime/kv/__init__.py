"""KV metadata: which sequence holds which block, and which blocks hold which tokens.

spec.py  sizes        hashing.py  keys        pool.py  blocks of one tier        prefix_cache.py  tables of sequences

The engine owns this for all ranks of a replica; ranks only ever see block ids. Nothing here touches a tensor, a clock
or a random number, so the same objects run in production, in the symbolic tests and in the simulator.
"""

"""CPU implementations: `cpu/<op>.py` exports `IMPLS` and is found by the registry on CPU devices."""

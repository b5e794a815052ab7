"""Triton implementations: `triton/<op>.py` exports `IMPLS` and is found by the registry on CUDA devices."""

"""Ops: a plain-torch reference each, CPU and Triton implementations behind `registry.bind`."""

"""Decisions about requests and replicas: one file per policy, each with a pure `decide(view, now) -> Decision`."""

"""The controller's decisions: jobs, replicas and placement as a sans-IO core. `deploy/server` does its I/O."""

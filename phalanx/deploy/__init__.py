"""YAML, plan, doctor, Ray actors and supervisor, gRPC server and client, CLI."""

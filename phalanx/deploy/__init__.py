"""YAML, plan, doctor, Ray actors and supervisor, gRPC server and client, CLI."""

import os

# gRPC's C core reads this once, when it is first imported: below ERROR it reports every orderly end of a connection.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

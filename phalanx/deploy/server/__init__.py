"""The gRPC front: public API, engine and supervisor links, and the shell around the controller core."""

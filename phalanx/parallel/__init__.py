"""Mesh, collectives, sharded linears, pipeline stages, rendezvous. Sole owner of torch.distributed."""

"""Routers: from logits to experts, weights and drops."""

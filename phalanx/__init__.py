"""Phalanx: a distributed inference runtime for language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phalanx.deploy.client import AsyncClient, Client
    from phalanx.runtime.llm import LLM
    from phalanx.runtime.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncClient", "Client", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import phalanx` pulls in neither torch nor Ray nor gRPC.
    if name == "LLM":
        from phalanx.runtime.llm import LLM

        return LLM
    if name == "SamplingParams":
        from phalanx.runtime.sampling_params import SamplingParams

        return SamplingParams
    if name in ("Client", "AsyncClient"):
        from phalanx.deploy import client

        return getattr(client, name)
    raise AttributeError(f"module 'phalanx' has no attribute {name!r}")

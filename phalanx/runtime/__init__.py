"""Request to token: scheduler, KV metadata, engine, worker, sampler, controller core, offline LLM."""

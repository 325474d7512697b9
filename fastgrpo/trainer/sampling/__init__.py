"""Completions: our sampler, transformers' `generate`, vLLM servers, and the protocol that all of them keep."""

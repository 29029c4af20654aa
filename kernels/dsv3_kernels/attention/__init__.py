"""Attention over the cache and over a prompt, and writes of cache entries."""

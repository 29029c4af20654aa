"""Attention over the cache and over a prompt, and the entries on their way into the cache."""

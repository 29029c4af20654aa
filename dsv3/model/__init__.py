"""The decoder on a flat batch of tokens."""

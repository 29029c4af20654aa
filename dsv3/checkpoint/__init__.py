"""Checkpoints: tensor specs and sharding; reading, checking, converting and loading weights."""

"""Ranks: groups, exchanges, parallel layers and how they hold their weights."""

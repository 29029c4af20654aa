"""Sharded layers: weights, linear layers, expert dispatch and expert placement."""

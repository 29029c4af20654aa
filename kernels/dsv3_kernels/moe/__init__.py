"""Routing of tokens to experts, and the experts' matrix products."""

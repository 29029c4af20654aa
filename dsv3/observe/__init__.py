"""Metrics and profiles."""

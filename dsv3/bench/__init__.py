"""Measures the engine, beside a named peer in the same run."""

"""Requests to steps to tokens: scheduling, step plans, execution, sampling."""

"""User interfaces: batch jobs, single prompts, chat on a terminal, metrics."""

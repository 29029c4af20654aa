"""The paged KV cache: geometry, bookkeeping, memory."""

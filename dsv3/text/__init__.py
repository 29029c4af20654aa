"""Text on both sides of the model: tokens, conversation formats, batch files. Free of torch."""

"""Matrix products, and the quantization of their operands."""

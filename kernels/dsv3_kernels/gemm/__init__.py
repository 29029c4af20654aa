"""Matrix products, and the FP8 format of their operands."""

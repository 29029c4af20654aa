"""What the benchmarks are made of: contests with a named peer in the same run, reports, flags."""

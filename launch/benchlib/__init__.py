"""Parts of the benchmarks: comparisons with a peer in the same run, reports, common flags."""

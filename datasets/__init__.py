"""Floor 2: readers of local data sets, and splits of them over clients."""

"""Jobs larger than a machine: streamed sources, shards, workers, packing, training on several processes."""

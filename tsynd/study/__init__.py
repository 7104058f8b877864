"""Studies with paired seeds: cells, their summary, the report."""

"""Programs of other runtimes."""

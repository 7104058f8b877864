"""Jobs in a folder that can be resumed: a whole run, and training."""

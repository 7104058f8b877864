"""Pages, pictures and plots of a run."""

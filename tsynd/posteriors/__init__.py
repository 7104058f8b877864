"""What samples a classifier: MC dropout, ensembles, sampled heads, and what runs them."""

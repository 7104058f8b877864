"""Sets of labelled images: reading, checking, splitting, streams."""

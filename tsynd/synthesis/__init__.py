"""The ascent: from images to targeted ones."""

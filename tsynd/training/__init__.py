"""Training of autoencoders and classifiers, with extra images."""

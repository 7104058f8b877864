"""A Hugging Face data set of images and labels to targeted images; made here from phantom cells."""

import datasets
from PIL import Image

import tsynd

cells, labels = tsynd.load_data("phantom").test.batch(range(60))
columns = {"image": [Image.fromarray((cell[0] * 255).byte().numpy()) for cell in cells], "label": labels.tolist()}
data = tsynd.load_data(datasets.Dataset.from_dict(columns))  # or datasets.load_dataset(...), with all its splits

autoencoder = tsynd.SmallAutoencoder(data.channels)
tsynd.fit_autoencoder(autoencoder, data.train, iterations=30, progress=False)
classifier = tsynd.SmallResNet(data.channels, data.num_classes)
tsynd.fit_classifier(classifier, data.train, iterations=30, progress=False)
result = tsynd.synthesize(autoencoder, classifier, data.train, progress=False)
print(f"{result.initial_uncertainty.mean():.4f} -> {result.uncertainty.mean():.4f} nats")

"""laplace-torch: a Laplace approximation of a trained classifier's last layer; no dropout is needed."""

import torch
from laplace import Laplace
from torch.utils.data import DataLoader, TensorDataset

import tsynd

data = tsynd.load_data("phantom", train_size=64)
autoencoder = tsynd.SmallAutoencoder(data.channels)
tsynd.fit_autoencoder(autoencoder, data.train, iterations=60, batch_size=32)
classifier = tsynd.SmallResNet(data.channels, data.num_classes)
tsynd.fit_classifier(classifier, data.train, iterations=30, batch_size=32)
classifier.to(memory_format=torch.contiguous_format)  # laplace-torch takes weights in torch's plain order only
laplace = Laplace(classifier, "classification", subset_of_weights="last_layer", hessian_structure="kron")
images = data.train.images.float() / 255
laplace.fit(DataLoader(TensorDataset(images, data.train.labels), batch_size=64))
result = tsynd.synthesize(autoencoder, tsynd.LaplaceHead(laplace), data.train)
print(f"{result.initial_uncertainty.mean():.4f} -> {result.uncertainty.mean():.4f} nats")

"""A Hugging Face vision transformer: its own dropouts, or one put before its head, are the posterior."""

from transformers import ViTConfig, ViTForImageClassification

import tsynd

data = tsynd.load_data("phantom", train_size=64)
autoencoder = tsynd.SmallAutoencoder(data.channels)
tsynd.fit_autoencoder(autoencoder, data.train, iterations=60, batch_size=32)
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
config = ViTConfig(**sizes, image_size=28, patch_size=7, num_channels=data.channels, num_labels=data.num_classes)
config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.1
classifier = tsynd.as_classifier(ViTForImageClassification(config), mean=0.5, std=0.5)  # as its image processor does
tsynd.fit_classifier(classifier, data.train, iterations=60)
result = tsynd.synthesize(autoencoder, classifier, data.train, samples=8)
print(f"{result.initial_uncertainty.mean():.4f} -> {result.uncertainty.mean():.4f} nats")

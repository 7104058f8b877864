"""MONAI models: an AutoencoderKL and a DenseNet whose layers have dropout."""

from monai.networks.nets import AutoencoderKL, DenseNet

import tsynd

data = tsynd.load_data("phantom", train_size=64)
plain = {"attention_levels": (False, False), "with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False}
model = AutoencoderKL(2, channels=(8, 16), num_res_blocks=1, norm_num_groups=8, latent_channels=4, **plain)
autoencoder = tsynd.as_autoencoder(model)  # in 3-D: AutoencoderKL(3, ...), the rest is the same
tsynd.fit_autoencoder(autoencoder, data.train, iterations=40, batch_size=16)
classifier = DenseNet(2, 1, data.num_classes, init_features=8, growth_rate=8, block_config=(2, 2), dropout_prob=0.2)
tsynd.fit_classifier(classifier, data.train, iterations=60)
result = tsynd.synthesize(autoencoder, classifier, data.train, samples=16)
print(f"{result.initial_uncertainty.mean():.4f} -> {result.uncertainty.mean():.4f} nats")

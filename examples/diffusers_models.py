"""A diffusers AutoencoderKL: latents as a diffusion pipeline scales them, pixels in its own range [-1, 1]."""

from diffusers import AutoencoderKL

import tsynd

data = tsynd.load_data("phantom", train_size=64)
blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
# a pretrained one: AutoencoderKL.from_pretrained(...), then as_autoencoder(model, grey=True) for images of one channel
model = AutoencoderKL(1, 1, **blocks, block_out_channels=(8, 16), norm_num_groups=8, mid_block_add_attention=False)
autoencoder = tsynd.as_autoencoder(model)
tsynd.fit_autoencoder(autoencoder, data.train, iterations=25, batch_size=16)
classifier = tsynd.SmallResNet(data.channels, data.num_classes)
tsynd.fit_classifier(classifier, data.train, iterations=30, batch_size=32)
result = tsynd.synthesize(autoencoder, classifier, data.train)
print(f"{result.initial_uncertainty.mean():.4f} -> {result.uncertainty.mean():.4f} nats")

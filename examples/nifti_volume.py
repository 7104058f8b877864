"""NIfTI volumes, one folder per class, to targeted images of their axial slices; made here from a 3-D phantom."""

import tempfile
from pathlib import Path

import nibabel
import numpy as np

import tsynd

with tempfile.TemporaryDirectory() as folder:
    for index, (volume, label) in enumerate(zip(*tsynd.load_data("phantom3d:16").test.batch(range(24)), strict=True)):
        path = Path(folder, f"class {int(label)}", f"{index}.nii.gz")
        path.parent.mkdir(exist_ok=True)
        nibabel.Nifti1Image(volume[0].permute(2, 1, 0).numpy(), np.diag([-1.0, -1.0, 2.5, 1.0])).to_filename(path)
    data = tsynd.load_data(folder, slices="axial", spacing=(1, 1, 5))  # slices=None takes whole volumes

autoencoder = tsynd.SmallAutoencoder(data.channels)
tsynd.fit_autoencoder(autoencoder, data.train, iterations=30, progress=False)
classifier = tsynd.SmallResNet(data.channels, data.num_classes)
tsynd.fit_classifier(classifier, data.train, iterations=30, progress=False)
result = tsynd.synthesize(autoencoder, classifier, data.train, progress=False)
print(f"{result.initial_uncertainty.mean():.4f} -> {result.uncertainty.mean():.4f} nats")

"""A folder of DICOM files, one folder per class, to targeted images; made here from a CT header and phantom cells."""

import tempfile
from pathlib import Path

import pydicom.examples

import tsynd

with tempfile.TemporaryDirectory() as folder:
    for index, (cell, label) in enumerate(zip(*tsynd.load_data("phantom").test.batch(range(60)), strict=True)):
        scan = pydicom.examples.ct
        scan.PatientID = f"patient {index // 3}"  # three images each, all in one split
        scan.set_pixel_data((cell[0] * 4095).numpy().astype("uint16"), "MONOCHROME2", 12)
        path = Path(folder, f"class {int(label)}", f"{index}.dcm")
        path.parent.mkdir(exist_ok=True)
        scan.save_as(path)
    data = tsynd.load_data(folder, window=(1000, 4000))  # centre and width in Hounsfield units

autoencoder = tsynd.SmallAutoencoder(data.channels)
tsynd.fit_autoencoder(autoencoder, data.train, iterations=30, progress=False)
classifier = tsynd.SmallResNet(data.channels, data.num_classes)
tsynd.fit_classifier(classifier, data.train, iterations=30, progress=False)
result = tsynd.synthesize(autoencoder, classifier, data.train, progress=False)
print(f"{result.initial_uncertainty.mean():.4f} -> {result.uncertainty.mean():.4f} nats")

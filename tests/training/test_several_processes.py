"""Training over several processes, and training that is killed: both end where one undisturbed process ends."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tsynd.jobs.train import TrainSettings, train_model
from tsynd.models.networks import SmallAutoencoder, SmallResNet
from tsynd.training.autoencoder import fit_autoencoder
from tsynd.training.classifier import fit_classifier
from tsynd.training.global_batch import GlobalBatch
from tsynd.training.loop import Checkpoint
from tsynd.utils.errors import InputError

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

# An autoencoder, then a classifier with dropout in all stages, batch norm, targeted images with a mask per image. The
# autoencoder is in double precision: its biases before a batch norm have no gradient but rounding, which Adam would
# take for one.
_WORKER = """
import sys, torch
from tsynd.training.augmentation import TargetedAugmentation
from tsynd.models.networks import SmallAutoencoder, SmallResNet
from tsynd.training.autoencoder import fit_autoencoder
from tsynd.training.classifier import fit_classifier

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
images, labels = torch.rand(33, 1, 8, 8, generator=generator), torch.arange(33) % 2
torch.manual_seed(0)

class Coder(SmallAutoencoder):
    def encode(self, x):
        return super().encode(x.double())

    def decode(self, z):
        return super().decode(z.double()).float()

model, coder = SmallResNet(widths=(4, 8), dropout="stages"), Coder(1, 2, (4, 8)).double()
options = {"iterations": 5, "batch_size": 11, "device": "cpu", "progress": False}
first = fit_autoencoder(coder, images, **options)
augmentation = TargetedAugmentation(coder, masks="independent", samples=4, steps=2, ratio=0.7)
second = fit_classifier(model, (images, labels), augmentation=augmentation, warmup_fraction=0.2, **options)
state = {"coder." + k: v for k, v in coder.state_dict().items()} | model.state_dict()
state["losses"] = torch.tensor([*first.losses, *second.losses])
ready = torch.distributed.is_initialized()
torch.save(state, sys.argv[1] + (str(torch.distributed.get_rank()) if ready else ""))
if ready:
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def _run(*command: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=180, check=False, **options)


def test_two_processes_train_what_one_does(tmp_path):
    (tmp_path / "worker.py").write_text(_WORKER)
    script = str(tmp_path / "worker.py")
    alone = _run(sys.executable, script, str(tmp_path / "alone"))
    assert alone.returncode == 0, alone.stderr[-2000:]
    both = _run(*TORCHRUN, script, str(tmp_path / "rank"))
    assert both.returncode == 0, both.stderr[-2000:]
    one, *ranks = (torch.load(tmp_path / name, weights_only=True) for name in ("alone", "rank0", "rank1"))
    torch.testing.assert_close(ranks[0]["losses"], one["losses"], rtol=1e-4, atol=1e-6)
    for key, value in one.items():
        close = {"rtol": 1e-5, "atol": 1e-6} if key.startswith("coder") else {"rtol": 1e-3, "atol": 5e-4}
        torch.testing.assert_close(ranks[0][key], value, **close, msg=lambda text, key=key: key + text)
        assert torch.equal(ranks[0][key], ranks[1][key]), key


_BAD = """
import os, sys, time, torch
from pathlib import Path
from tsynd.models.networks import SmallResNet
from tsynd.training.classifier import fit_classifier

images, labels = torch.rand(24, 1, 8, 8), torch.arange(24) % 2
def extra(classifier, x, y):
    bad = torch.distributed.get_rank() == 1
    return (x * float("nan") if bad else x), y
from tsynd.utils.errors import InputError
try:
    fit_classifier(SmallResNet(widths=(4, 8)).apply(lambda m: setattr(m, "training", True)), (images, labels),
                   augmentation=extra, iterations=4, batch_size=8, device="cpu", progress=False)
except InputError as error:
    Path(sys.argv[1] + os.environ["RANK"]).write_text(str(error))
end = time.monotonic() + 60
while not all(Path(sys.argv[1] + rank).exists() for rank in "01"):
    assert time.monotonic() < end, "the other process did not stop"
    time.sleep(0.05)
time.sleep(0.5)
os._exit(0)  # gloo's threads may abort where one process leaves first
"""


def test_a_loss_that_is_not_finite_in_one_process_stops_all_with_the_same_error(tmp_path):
    (tmp_path / "worker.py").write_text(_BAD)
    result = _run(*TORCHRUN, str(tmp_path / "worker.py"), str(tmp_path / "error"))
    assert result.returncode == 0, result.stderr[-2000:]
    texts = [(tmp_path / f"error{rank}").read_text() for rank in (0, 1)]
    assert texts[0] == texts[1]
    assert texts[0].startswith("loss: got nan at iteration 2")


def test_the_command_equals_its_two_processes_and_survives_kills(tmp_path):
    torch.manual_seed(0)
    options = ["--data", "phantom", "--train-size", "40", "--iterations", "20", "--batch-size", "12", "--quiet"]
    options += ["--device", "cpu", "--checkpoint-every", "3", "--seed", "3"]
    command = [sys.executable, "-m", "tsynd", "train", *options, "--output"]
    whole = _run(*command, str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr[-2000:]
    moments = random.Random(7)
    kills = 0
    for _ in range(20):
        killed = subprocess.Popen(
            [*command, str(tmp_path / "killed")], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        state = tmp_path / "killed" / "training.safetensors"
        before = state.stat().st_mtime_ns if state.exists() else 0
        while killed.poll() is None and (not state.exists() or state.stat().st_mtime_ns == before):
            time.sleep(0.002)
        time.sleep(moments.random() * 0.1)
        if killed.poll() is not None:
            break
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        kills += 1
        if kills == 2:
            break
    assert kills == 2
    last = _run(*command, str(tmp_path / "killed"))
    assert last.returncode == 0, last.stderr[-2000:]
    name = "classifier.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    two = _run(*TORCHRUN, "-m", "tsynd", "train", *options, "--output", str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr[-2000:]
    one, other = (load_file(tmp_path / folder / "training.safetensors")["losses"] for folder in ("whole", "two"))
    torch.testing.assert_close(other[:8], one[:8], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(other, one, rtol=0.1, atol=0.02)  # Adam amplifies what rounding does

    with pytest.raises(InputError, match="iterations 20 → 21, batch_size 12 → 64"):
        train_model("phantom", tmp_path / "whole", TrainSettings(train_size=40, iterations=21, seed=3), device="cpu")


def _data(count: int = 20):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 1, 8, 8, generator=generator), torch.arange(count) % 2


@pytest.mark.parametrize("kind", ["classifier", "autoencoder"])
def test_an_interrupted_training_goes_on_exactly(tmp_path, kind, monkeypatch):
    def fit(checkpoint):
        torch.manual_seed(0)
        if kind == "classifier":
            model = SmallResNet(widths=(4, 8), dropout="stages")
            fit_classifier(model, _data(), iterations=9, batch_size=6, progress=False, checkpoint=checkpoint)
        else:
            model = SmallAutoencoder(1, 2, (4, 8))
            fit_autoencoder(model, _data()[0], iterations=9, batch_size=6, progress=False, checkpoint=checkpoint)
        return model.state_dict()

    whole = fit(None)
    checkpoint = Checkpoint(tmp_path / "state.safetensors", 4)
    steps = iter(range(6))
    step = torch.optim.AdamW.step

    def stop(self, *given):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(checkpoint)
    monkeypatch.undo()
    resumed = fit(checkpoint)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    again = fit(checkpoint)  # a finished one has nothing left to do
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_a_checkpoint_of_another_training_or_a_damaged_one_is_refused(tmp_path):
    checkpoint = Checkpoint(tmp_path / "state.safetensors", 2)
    options = {"batch_size": 6, "progress": False, "checkpoint": checkpoint}
    fit_classifier(SmallResNet(widths=(4, 8)), _data(), iterations=2, **options)
    with pytest.raises(InputError, match="iterations 2 → 3"):
        fit_classifier(SmallResNet(widths=(4, 8)), _data(), iterations=3, **options)
    with pytest.raises(InputError, match="does not fit this model"):
        fit_classifier(SmallResNet(widths=(4, 12)), _data(), iterations=2, **options)
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:-9])
    with pytest.raises(InputError, match="cannot be read"):
        fit_classifier(SmallResNet(widths=(4, 8)), _data(), iterations=2, **options)
    about = {"settings": "[" * 100_000, "step": "2", "extra": "{}", "digest": ""}
    save_file({"x": torch.zeros(1)}, checkpoint.path, about)
    with pytest.raises(InputError, match="cannot be read"):
        fit_classifier(SmallResNet(widths=(4, 8)), _data(), iterations=2, **options)
    with pytest.raises(InputError, match="every 0"):
        Checkpoint(tmp_path / "x", 0)


def test_shares_of_a_batch_draw_what_the_whole_batch_draws():
    x = torch.rand(7, 3, 4, 4)
    wide = x.to(memory_format=torch.channels_last)
    for draw in (
        lambda x: torch.nn.functional.dropout(x, 0.5),
        lambda x: torch.nn.functional.dropout2d(x, 0.5),
        lambda x: torch.nn.functional.alpha_dropout(x, 0.5, True),
        lambda x: torch.nn.Dropout(0.3)(x),
        torch.randn_like,
        lambda x: torch.rand([len(x), 1, 1, 1]),
        lambda x: torch.randn(len(x), 2),
    ):
        for images in (x, wide):
            torch.manual_seed(0)
            whole = draw(images)
            for rows in (torch.arange(7)[::2], torch.arange(7)[1::2]):
                torch.manual_seed(0)
                with GlobalBatch(rows, 7):
                    part = draw(
                        images[rows].contiguous(memory_format=torch.channels_last) if images is wide else images[rows]
                    )
                assert torch.equal(part, whole[rows])

"""What `make wheel` runs with the installed wheel, torch and numpy alone, from another folder."""

import torch

import tsynd
from tsynd import ops
from tsynd.ops import reference

assert ops.compiled, "the wheel's extension did not load"
torch.manual_seed(0)
logits = torch.randn(9, 5, 3)
value, gradient = ops.logits_uncertainty(logits)
wanted = reference.logits_uncertainty(logits.double())
torch.testing.assert_close(value.double(), wanted[0], rtol=1e-4, atol=1e-6)
torch.testing.assert_close(gradient.double(), wanted[1], rtol=1e-4, atol=1e-6)

classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(64, 3))
pair = (torch.nn.Identity(), torch.nn.Identity())
result = tsynd.synthesize(pair, classifier, torch.rand(20, 1, 8, 8), progress=False)
assert (result.uncertainty >= result.initial_uncertainty).all()
print(
    f"tsynd {tsynd.__version__} with torch {torch.__version__} from {tsynd.__file__}: {len(result)} images, "
    f"{float(result.initial_uncertainty.mean()):.4f} -> {float(result.uncertainty.mean()):.4f} nats"
)

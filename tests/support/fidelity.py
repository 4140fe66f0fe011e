"""Distances by torch-fidelity: python fidelity.py FEATURES.npz prints them as JSON.

The file has the features `generated` (n, dim) and `reference` (m, dim). torch-fidelity is in a folder of its own, as it
needs a torchvision that fits torch, and its wheel has a package `tests`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".venv-fidelity"


def fidelity(python: Path, features: Path) -> dict[str, float]:
    """Return torch-fidelity's distances of a file of features, computed by another Python."""
    environment = {**os.environ, "PYTHONPATH": str(FOLDER)}
    command = [python, __file__, features]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def main(path: str) -> None:
    import numpy as np
    import torch
    from torch_fidelity import metric_fid, metric_kid, metric_prc

    with np.load(path) as file:
        generated, reference = (torch.from_numpy(file[name]) for name in ("generated", "reference"))
    moments = [metric_fid.fid_features_to_statistics(one.double()) for one in (generated, reference)]
    size = min(len(generated), len(reference))
    results = {
        **metric_fid.fid_statistics_to_metric(*moments, False),
        # One subset of all images: the estimate itself, without the randomness of subsets.
        **metric_kid.kid_features_to_metric(
            generated.double(), reference.double(), kid_subsets=1, kid_subset_size=size, verbose=False
        ),
        **metric_prc.prc_features_to_metric(generated.double(), reference.double(), verbose=False),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])

"""Checkpoints that other projects' own code makes give the features of their own encoders.

Skipped where MOCOFAST_PROJECTS names no folder of `tests/other_projects.sh`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mocofast.interop.reference_checkpoints import load_any
from mocofast.models.encoders import features
from tests.other_projects import MAKERS


@pytest.mark.parametrize("name", MAKERS)
def test_files_of_a_projects_own_code_give_its_features(name: str, tmp_path: Path) -> None:
    folder = Path(os.environ.get("MOCOFAST_PROJECTS", "nowhere")) / MAKERS[name][0]
    if not folder.is_dir():
        pytest.skip(f"needs {MAKERS[name][0]} in the folder of MOCOFAST_PROJECTS")
    path = tmp_path / "file.pth"
    places = f"{folder / 'checkout'}{os.pathsep}{folder / 'packages'}"
    script = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("other_projects.py"))]
    environment = {**os.environ, "PYTHONPATH": places, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*script, name, str(path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = torch.load(f"{path}.features", weights_only=True)
    encoder = load_any(str(path)).method.encoder_q.eval()
    with torch.no_grad():
        found = features(encoder, expected["images"])
    assert expected["features"].std() > 0.01
    torch.testing.assert_close(found, expected["features"], rtol=1e-5, atol=1e-5)

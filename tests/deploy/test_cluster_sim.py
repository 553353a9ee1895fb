"""The manifests at work: their processes started here as a cluster would, one Deployment rolled, a replica killed, under load."""

import subprocess
import sys

import pytest

from tests.cluster import images, isolation
from tests.deploy.manifests import ROOT


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_no_search_fails_while_a_deployment_rolls_and_a_replica_dies(tmp_path):
    """Every search is answered, by all shards; every pod that is told to end does so by itself, with status 0."""
    why = images.trouble() or isolation.trouble()
    if why:
        pytest.skip(f"a cluster's processes cannot be started here: {why}")
    command = [sys.executable, "-m", "tests.cluster", "--short", "--busy", "--logs", str(tmp_path / "logs")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]

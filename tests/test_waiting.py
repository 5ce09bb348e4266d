"""How OpenMP's threads wait: chosen before torch is imported, by every script; the user's choice stays."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from infra import waiting


def is_script(file) -> bool:
    return '__name__ == "__main__"' in file.read_text()


SCRIPTS = [str(file) for file in sorted(ROOT.glob("*.py")) if is_script(file)]
BENCHMARKS = [str(file) for file in sorted(ROOT.glob("benchmarks/*.py")) if is_script(file)]
STUDY = [str(file) for file in sorted(ROOT.glob("study/*.py")) if is_script(file)]
# Runs each script up to its import of torch, and says what the environment held then
UP_TO_TORCH = """
import json, os, runpy, sys

class Torch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise SystemExit("torch")

sys.meta_path.insert(0, Torch())
root, *scripts = sys.argv[1:]
path = list(sys.path)
held = {}
for script in scripts:
    sys.path[:] = [os.path.dirname(script), *path]
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(root):
            del sys.modules[name]
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"):
        os.environ.pop(name, None)
    try:
        runpy.run_path(script)
        end = "its end"
    except SystemExit as reached:
        end = str(reached)
    held[script] = [end, os.environ.get("GOMP_SPINCOUNT")]
print(json.dumps(held))
"""


@pytest.fixture(scope="module")
def held() -> dict[str, list]:
    """By script, where it was stopped and what the variable held there."""
    command = [sys.executable, "-c", UP_TO_TORCH, str(ROOT), *SCRIPTS, *BENCHMARKS, *STUDY]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_each_script_chooses_before_torch(held):
    foreign = ("peer_trl.py", "word_problems.py")  # these import nothing of ours
    found = {script: value for script, value in held.items() if not script.endswith(foreign)}
    assert len(found) > 20
    reached_torch = [script for script, (end, _) in found.items() if end == "torch"]
    assert len(reached_torch) > 20
    assert {script: value for script, (_, value) in found.items()} == dict.fromkeys(
        found, waiting.SPINS
    )


def test_tests_wait_so_too():
    assert any(name in os.environ for name in waiting.SETTINGS)


@pytest.mark.parametrize("name", waiting.SETTINGS)
def test_the_users_own_setting_stays(name):
    environment = {name: "5", "OMP_NUM_THREADS": "2"}
    assert waiting.choose(environment) == {}
    assert environment == {name: "5", "OMP_NUM_THREADS": "2"}


def test_without_a_setting_threads_spin_little():
    environment = {}
    assert waiting.choose(environment) == environment == {"GOMP_SPINCOUNT": "1000"}

"What every test shares: the repository's root, the project's scripts, and a run that fails if it tested nothing"
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1") # before torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MPLBACKEND", "Agg") # kernels and subprocesses that draw pages drop it
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/".ci"))


@pytest.fixture(scope="session")
def root()->Path:
    "The repository"
    return ROOT


@pytest.fixture
def clean_env()->dict:
    "Environment for a subprocess: without what a test run sets"
    return {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "IN_TEST", "PYTHONPATH")}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    "No server answers and nothing was fetched before"
    import srnb.rewards as R
    monkeypatch.setattr(R, "_answers", lambda url, seconds=4.: False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path/"hub"))
    R.scorer_of.cache_clear()
    yield tmp_path
    R.scorer_of.cache_clear()


def pytest_runtest_logreport(report):
    if report.when == "call" and report.outcome in ("passed", "failed"): pytest_runtest_logreport.executed += 1


pytest_runtest_logreport.executed = 0


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == 0 and not session.config.option.collectonly and not pytest_runtest_logreport.executed:
        print("\nno test was executed: everything was skipped or deselected", file=sys.stderr)
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED

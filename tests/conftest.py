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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory)->Path:
    "Folder of a tiny policy with random weights"
    import torch

    from srnb.core import generator
    from srnb.nets import SmallUNet, UNetConfig
    from srnb.policies import Policy, save_pretrained
    net, g = SmallUNet(UNetConfig((16, 16), (1, 1), 16)), generator(0)
    with torch.no_grad():
        for p in net.parameters():
            scale = 0.4/p[0].numel()**0.5 if p.ndim > 1 else 0.05
            p.copy_(torch.randn(p.shape, generator=g)*scale)
    return save_pretrained(Policy(net), tmp_path_factory.mktemp("tiny")/"policy")


def same_result(a:Path, b:Path)->None:
    "Two finished runs hold the same metrics, log and adapter, which is not zero"
    import pandas as pd
    import torch
    from safetensors.torch import load_file

    from srnb.core import read_run
    assert read_run(a)[1].equals(read_run(b)[1])
    assert pd.read_parquet(a/"log.parquet").equals(pd.read_parquet(b/"log.parquet"))
    x, y = (load_file(o/"adapter"/"adapter_model.safetensors") for o in (a, b))
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    assert any(v.abs().sum() > 0 for k, v in x.items() if "lora_A" not in k)


@pytest.fixture
def deadly(monkeypatch):
    "count(owner, name): a function is counted in `calls`; at call number `die[name]` it raises KeyboardInterrupt(name)"
    calls, die = {}, {}

    def count(owner, name):
        real = getattr(owner, name)
        calls[name] = 0

        def call(*a, **k):
            if calls[name] == die.get(name): raise KeyboardInterrupt(name)
            calls[name] += 1
            return real(*a, **k)
        monkeypatch.setattr(owner, name, call)
    return count, calls, die


@pytest.fixture
def drawn(monkeypatch)->list:
    "Grows with every call of `Policy.sample`"
    from srnb.policies import Policy
    calls, sample = [], Policy.sample
    monkeypatch.setattr(Policy, "sample", lambda *a, **k: calls.append(1) or sample(*a, **k))
    return calls


@pytest.fixture
def idle(monkeypatch)->None:
    "Nothing may be sampled: what is refused is refused before any work"
    from srnb.policies import Policy
    monkeypatch.setattr(Policy, "sample", lambda *a, **k: pytest.fail("sampled"))


def clean(env)->dict:
    "An environment without what a test run sets; it imports the package that is tested, wherever a program works"
    import srnb
    package = str(Path(srnb.__file__).parent.parent)
    return {k: v for k, v in env.items() if k not in ("MPLBACKEND", "IN_TEST")} | {"PYTHONPATH": package}


@pytest.fixture
def clean_env()->dict:
    "Environment for a subprocess"
    return clean(os.environ)


def _forked(tmp_path_factory):
    import forks
    forks.start()
    folder, started = tmp_path_factory.mktemp("forks"), []

    def start(what, *args, cwd=None, **env):
        started.append(forks.Fork(what, *args, folder=folder, env=clean(os.environ) | env, cwd=cwd))
        return started[-1]
    yield start
    for o in started:
        o.kill()
        o.wait()


@pytest.fixture
def forked(tmp_path_factory):
    "forked(what, *args, cwd, **env): a warm process, see forks.py; what still runs when the test ends is killed"
    yield from _forked(tmp_path_factory)


@pytest.fixture(scope="module")
def forked_for_all(tmp_path_factory):
    "The same, for what the tests of a module share"
    yield from _forked(tmp_path_factory)


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


ALONE = "tests/test_notebooks.py::" # its tests share nothing, and fill what the files leave of a core


def pytest_collection_modifyitems(items):
    "Notebooks come last; among them experiments, which take longest, come first"
    items.sort(key=lambda o: o.nodeid.startswith(ALONE) + (o.nodeid.startswith(ALONE) and "[train_" not in o.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "The tests of a file stay together, because they share what it has made; notebooks are dealt out one by one"
    if config.getoption("dist") != "load": return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid): return nodeid if nodeid.startswith(ALONE) else nodeid.partition("::")[0]
    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_runtest_logreport(report):
    if report.when == "call" and report.outcome in ("passed", "failed"): pytest_runtest_logreport.executed += 1


pytest_runtest_logreport.executed = 0


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == 0 and not session.config.option.collectonly and not pytest_runtest_logreport.executed:
        print("\nno test was executed: everything was skipped or deselected", file=sys.stderr)
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED

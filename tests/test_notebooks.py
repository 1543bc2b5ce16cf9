"""Every notebook runs to its end, as nbdev_test runs it or, where its front matter says `skip_exec`, as papermill does,
each in a warm process of its own. Benchmarks are run by `make speed`, and one of them by test_bench.py"""
import sys
from pathlib import Path

import forks
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPARED = "index", "api", "refs" # test_site.py runs them, and compares what they show
PATHS = [p for p in sorted((ROOT/"nbs").glob("[!._]*.ipynb")) if p.stem not in COMPARED]


def runs(path:Path)->bool:
    "Whether nbdev_test executes a notebook"
    first = nbformat.read(path, as_version=4).cells[:3]
    return not any(o.cell_type == "raw" and "skip_exec: true" in o.source for o in first)


ROOMS = [p for p in PATHS if runs(p)]
OTHERS = [p for p in PATHS if not runs(p) and not p.stem.startswith("bench_")]


def execute(path:Path)->None:
    from nbdev.config import get_config
    from nbdev.test import test_nb
    done, seconds = test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=ROOT)
    sys.exit(not done)


def test_there_are_some(): assert len(ROOMS) > 20 and len(OTHERS) > 5


@pytest.mark.parametrize("path", ROOMS, ids=lambda p: p.stem)
def test_notebook(path, forked):
    run = forked(execute, path, cwd=ROOT/"nbs")
    assert run.wait() == 0, run.err[-5000:]


def shown(path:Path):
    "A test's parameter: studies are fast, what only shows records is slow"
    return pytest.param(path, id=path.stem, marks=() if path.stem.startswith("train_") else pytest.mark.slow)


@pytest.mark.parametrize("path", [shown(p) for p in OTHERS])
def test_papermill(path, forked, tmp_path):
    run = forked(forks.notebook, path, tmp_path/"out.ipynb", {}, cwd=ROOT, IN_TEST="1")
    assert run.wait() == 0, run.err[-5000:]


def parameters_at(path:Path)->int|None:
    "Number of the code cell that papermill's parameters follow"
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    return next((i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", [])), None)


@pytest.mark.parametrize("path", [p for p in PATHS if parameters_at(p) is not None], ids=lambda p: p.stem)
def test_a_notebook_with_parameters_knows_their_names(path):
    "papermill only warns of a misspelt one, and the notebook would run on its defaults"
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    after = cells[parameters_at(path)+1].source
    own = "checked_parameters(globals(), _before, _own" in after
    assert own or "fill(" in after and "parameters(globals()" in after

"""Every notebook runs to its end, as nbdev_test runs it, each in a warm process of its own. Those with `skip_exec` in
their front matter are run elsewhere or by hand"""
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent


def runs(path:Path)->bool:
    "Whether a notebook is executed with the others"
    first = nbformat.read(path, as_version=4).cells[:3]
    return not any(o.cell_type == "raw" and "skip_exec: true" in o.source for o in first)


COMPARED = "index", "api", "refs" # test_site.py runs them, and compares what they show
NOTEBOOKS = [p for p in sorted((ROOT/"nbs").glob("[!._]*.ipynb")) if runs(p) and p.stem not in COMPARED]


def execute(path:Path)->None:
    from nbdev.config import get_config
    from nbdev.test import test_nb
    done, seconds = test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=ROOT)
    sys.exit(not done)


def test_there_are_some(): assert len(NOTEBOOKS) > 20


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path, forked):
    run = forked(execute, path, cwd=ROOT/"nbs")
    assert run.wait() == 0, run.err[-5000:]

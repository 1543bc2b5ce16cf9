"The notebooks of experiments with parameters other than their own: studies over several machines, names, bad input"
import json
import re
from pathlib import Path

import forks
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def papermill(forked, tmp_path):
    "papermill(name, work, **parameters): a notebook run by a warm process; exit code, output and errors"
    def run(name, work=forks.notebook, **parameters):
        done = forked(work, ROOT/f"nbs/{name}.ipynb", tmp_path/"out.ipynb", parameters, cwd=ROOT, IN_TEST="1")
        return done.wait(), done.out, done.err
    return run


@pytest.mark.slow
def test_a_study_over_two_machines(papermill, tmp_path):
    "Each leaves its record behind; the second one adds its runs, repeats none, and refuses another study's record"
    record, found, plan = tmp_path/"record", [], json.loads((ROOT/"nbs/dp2o_study.json").read_text())
    plan["rows"] = {name: plan["rows"][name] for name in ("flow", "NR only")}
    (tmp_path/"study.json").write_text(json.dumps(plan))
    study = dict(study=str(tmp_path/"study.json"), record_dir=str(record))
    for rows in ("flow", "flow;NR only"):
        code, out, err = papermill("train_study", **study, rows=rows)
        assert code == 0, err
        assert "1 of 1: " in out + err
        found.append((json.loads((record/"runs.json").read_text()), pd.read_parquet(record/"metrics.parquet"),
                      (record/"changes.jpg").read_bytes()))
    (one, first, picture), (both, metrics, later) = found
    assert [o["run"] for o in both] == ["flow, seed 0", "NR only, seed 0"] and both[:1] == one and picture == later
    again = metrics[metrics.row == "flow"].astype(first.dtypes)
    pd.testing.assert_frame_equal(again, first, check_categorical=False)
    assert set(metrics.row) == {"flow", "NR only"}
    assert not metrics.duplicated(["row", "training", "image", "seed", "metric", "variant"]).any()
    code, _, err = papermill("train_study", **study, held_out="srnb/photos")
    assert code and str(record) in err and "ValueError" in err


@pytest.mark.slow # another study is run by test_notebooks.py
@pytest.mark.repeat
def test_study_of_methods(papermill):
    "The study of all methods in miniature: two rows, their record, and the picture of crops"
    code, out, err = papermill("train_study", study="nbs/methods_study.json")
    assert code == 0, err
    assert "2 of 2 runs recorded" in out + err


WRONG = [("train_dp2o", dict(iterations=3), "'iterations'.*'steps'"), ("train_asasr", dict(kapa=3), "'kapa'.*'kappa'"),
         ("train_dro", dict(capacty=3), "'capacty'.*'capacity'"), ("train_sft", dict(patch=64.5), "patch.*64.5"),
         ("train_ctmsr", dict(gap="dmd"), "gap.*'dmd'.*'dtm'"), ("train_study", dict(rowz="flow"), "'rowz'.*rows"),
         ("train_study", dict(rows="flaw"), "flaw"), ("table_dp2o", dict(recod_dir="x"), "'recod_dir'.*'record_dir'"),
         ("bench_spectral", dict(reps="many"), "reps must be a whole number"),
         ("compare_upscalers", dict(photographs="x"), "'photographs' is called 'photos' now"),
         ("compare_pictures", dict(mean_on="seesr"), "mean_on: 'seesr' is none of")]


@pytest.mark.parametrize("name, parameters, named", WRONG, ids=[f"{n}-{list(o)[-1]}" for n, o, _ in WRONG])
def test_names(papermill, name, parameters, named):
    "An old name is answered with the new one, a misspelt one with the nearest, before anything runs"
    code, out, err = papermill(name, **parameters)
    assert code and "updates" not in out
    assert re.search(named, err, re.DOTALL), err[-2000:]


def offline(path, out, parameters):
    "A notebook where no server answers and nothing was fetched before"
    import os

    import srnb.rewards as R
    from huggingface_hub import constants
    R._answers, constants.HF_HUB_CACHE = (lambda *a: False), str(out.parent)
    os.environ["TORCH_HOME"] = str(out.parent)
    forks.notebook(path, out, parameters)


def test_a_metric_that_cannot_be_had_is_named(papermill):
    code, _, err = papermill("train_dp2o", offline, reward="dp2o")
    assert code and "MetricUnavailable" in err and "offline" in err

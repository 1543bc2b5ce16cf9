"DP2O-SR end to end on a tiny network: its record, killed and resumed, other forms, shared banks, bad input"
import json
import signal
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import same_result
from forks import cut

import srnb.align
import srnb.runs
import srnb.train
from srnb.align import DP2O, Run, Top, align
from srnb.config import fill, record
from srnb.core import RunOccupied, open_run, read_run, run_done
from srnb.curation import finished_groups
from srnb.nets import SmallUNet, UNetConfig
from srnb.policies import Policy, save_pretrained
from srnb.rewards import MetricUnavailable
from srnb.runs import Base, Data, Judging, record_of
from srnb.train import presets
from srnb.training import Loop, latest_checkpoint

CENTRAL = dict(intra=False, inter=False) # every pair has weight 1


@pytest.fixture(scope="module")
def config(tiny):
    loop = Loop(steps=6, lr=1e-3, warmup=2, save_every=2, log_every=1, ema=.5)
    return Run("", replace(DP2O, winners=Top(1)), Data(size=64, places=1, take=2),
               Base(str(tiny), precision="no", sample_steps=2),
               Judging("offline_nr", m=3, judges=("psnr_y",), eval_m=2), loop, rank=2, batch=2, patch=32)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    "A run that nobody disturbed"
    return align(replace(config, out=str(tmp_path_factory.mktemp("runs")/"whole")))


# ---------------------------------------------------------------- the record

def test_record(whole, config):
    conf, metrics = read_run(whole)
    said = conf["params"]["config"]
    assert not {"out", "banks"} & set(said) and said["method"]["link"] == {"is": "Logistic", "kappa": 1000.}
    assert conf["versions"]["torch"] and len(conf["params"]["stands_for"]["base"]) == 16
    assert srnb.train.read_config(whole/"config.json", "x") == replace(config, out="x") # it can be run again
    assert set(metrics.variant) == {"before", "after", "bicubic"}
    assert set(metrics.metric) == {"reward", "piqe", "psnr_y", "moved", "spread"}
    rows = metrics[(metrics.variant != "bicubic") & (metrics.metric != "spread")]
    assert (rows.groupby(["metric", "variant", "image"]).size() == config.judging.eval_m).all()
    log = pd.read_parquet(whole/"log.parquet")
    assert log.step.tolist() == [1, 2, 3, 4, 5, 6] and log.gap_w[0] == 0
    assert abs(log.loss[0]-0.6931) < 0.15 # ln 2 times the weights


@pytest.mark.parametrize("name", ["dp2o", "base", "ctmsr"])
@pytest.mark.parametrize("fast, precision", [(torch.bfloat16, "bf16"), (torch.float32, "no")])
def test_the_record_names_the_precision(name, fast, precision, monkeypatch, tmp_path):
    """Auto is what the machine does fast; what was written down stays, and another machine's record is not mixed with
    this one's"""
    monkeypatch.setattr(srnb.runs, "usual_dtype", lambda: fast)
    def made(precision="auto"): return fill(presets()[name][1], dict(precision=precision))
    def said(run): return (record(run)["base"] if name == "dp2o" else record(run))["precision"]
    assert said(made()) == precision == said(replace(made(), seed=1))
    assert said(made("bf16")) == "bf16" and said(made("no")) == "no"
    with pytest.raises(ValueError, match="precision.*'fp8'.*bf16"): made("fp8")
    open_run(tmp_path/"run", record_of(made()))
    other = torch.float32 if precision == "bf16" else torch.bfloat16
    monkeypatch.setattr(srnb.runs, "usual_dtype", lambda: other)
    with pytest.raises(RunOccupied, match="precision"): open_run(tmp_path/"run", record_of(made()))


# ---------------------------------------------------------------- killed and resumed

def test_killed_and_resumed(whole, config, tmp_path, deadly):
    "Killed within bank, training and the last bank: nothing finished is done again, the result is the same"
    run, (count, calls, die) = replace(config, out=str(tmp_path/"cut")), deadly
    count(Policy, "sample")
    count(srnb.align, "draw_pairs")
    die.update(sample=1)
    with pytest.raises(KeyboardInterrupt, match="sample"): align(run)
    assert len(finished_groups(tmp_path/"cut"/"bank")) == 1
    die.update(sample=-1, draw_pairs=3)
    with pytest.raises(KeyboardInterrupt, match="draw_pairs"): align(run)
    assert latest_checkpoint(tmp_path/"cut").name == "checkpoint-00000002" and calls["sample"] == 4
    die.update(sample=5, draw_pairs=-1)
    with pytest.raises(KeyboardInterrupt, match="sample"): align(run)
    die.update(sample=-1)
    same_result(align(run), whole)
    once = dict(sample=6, draw_pairs=3+4) # 2 + 2 + 2 groups; steps 0 1 2 | 2 3 4 5
    assert calls == once
    align(run)
    assert calls == once # done: nothing runs


@pytest.mark.repeat # the same as in test_align.py, through the command line
def test_kill_9(whole, config, tmp_path, forked):
    "The same through the command line, by SIGKILL while the bank is drawn and after a checkpoint"
    out, path = tmp_path/"killed", tmp_path/"config.json"
    path.write_text(json.dumps(dict(run="Run", config=record(replace(config, out=str(out))))))
    for name, call in (("srnb.policies.Policy.sample", 1), ("srnb.align.draw_pairs", 3)):
        run = forked(cut, name, call, .01, srnb.train.main, [str(path)])
        assert run.wait() == -signal.SIGKILL, run.err
        assert finished_groups(out/"bank") and not run_done(out)
    assert latest_checkpoint(out) is not None
    done = forked("-m", "srnb.train", path)
    assert done.wait() == 0, done.err
    same_result(out, whole)


# ---------------------------------------------------------------- other forms

FORMS = [dict(path="vp_eps", sampler="ddpm"), dict(path="vp_v", sampler="ab2", safeguard=True),
         dict(frozen=True, **CENTRAL)]


@pytest.mark.parametrize("change", FORMS, ids=lambda o: "-".join(map(str, o.values())))
def test_forms(config, tmp_path, change):
    "One flow network as diffusion policy, the safeguard, the frozen scale: the whole way runs and starts at ln 2"
    out = align(fill(config, dict(change, out=str(tmp_path/"run"), steps=2)))
    log = pd.read_parquet(out/"log.parquet")
    assert abs(log.loss[0]-0.6931) < 0.15 and log.drift[0] == 0 and log.drift[1] > 0 and len(read_run(out)[1])
    if change.get("safeguard"): assert (log.safeguard <= 1).all() and (log.safeguard > 0).all()
    if "intra" in change: assert abs(log.loss[0]-0.6931) < 1e-4


def test_shared_banks(whole, config, tmp_path, drawn):
    """Runs that draw the same candidates share them: the second samples only after its own training; sharing changes
    no result; samples before of several sizes lie side by side"""
    banks = tmp_path/"banks"
    shared = replace(config, banks=str(banks))
    same_result(align(replace(shared, out=str(tmp_path/"a"))), whole)
    assert len(drawn) == 6
    out = align(fill(shared, dict(out=str(tmp_path/"b"), reward="offline_fr", judges=["piqe", "gmsd"])))
    assert len(drawn) == 8
    metrics = read_run(out)[1]
    assert set(metrics.metric) == {"reward", "st_lpips_alex", "gmsd", "piqe", "moved", "spread"}
    moved = metrics[metrics.metric == "moved"].groupby("variant").value.agg(["min", "max"])
    assert moved["max"]["before"] == 0 < moved["min"]["after"]
    before = {f: f.stat().st_mtime_ns for f in (banks/"before-2").rglob("*.safetensors")}
    align(fill(shared, dict(out=str(tmp_path/"c"), eval_m=1, steps=1)))
    assert len(drawn) == 12 and len(finished_groups(banks/"before-1")) == 2
    assert before and all(f.stat().st_mtime_ns == at for f, at in before.items())
    with pytest.raises(RunOccupied, match="policy"): align(fill(shared, dict(out=str(tmp_path/"d"), path="vp_v")))


# ---------------------------------------------------------------- bad input

def test_metric_that_cannot_be_had(config, tmp_path, idle, offline):
    "Named, with the preset that works, before anything is sampled or written"
    run = fill(config, dict(out=str(tmp_path/"x"), reward="dp2o"))
    with pytest.raises(MetricUnavailable, match="offline"): align(run)
    assert not (tmp_path/"x").exists()


@pytest.mark.parametrize("change, named", [
    (dict(n=2), "N = 2, M = 3"), (dict(m=1), "M = 1"), (dict(m=0), "m.*0"), (dict(kappa=0.), "kappa.*0"),
    (dict(reward="musiq"), "reward.*'musiq'.*dp2o.*offline_nr"), (dict(reward=None), "reward"),
    (dict(patch=128), r"patch = 128.*\(64\)"), (dict(places=9), "places.*9"), (dict(take=-1), "take.*-1"),
    (dict(eval_m=0), "eval_m.*0"), (dict(rank=0), "rank.*0"), (dict(batch=0), "batch.*0"),
    (dict(sample_steps=0), "sample_steps.*0"), (dict(path="vp"), "path.*'vp'.*vp_eps"),
    (dict(sampler="heun"), "sampler.*'heun'.*ab2"), (dict(judges=["psnr"]), "judges.*'psnr'.*psnr_y")])
def test_config(config, change, named):
    with pytest.raises(ValueError, match=named): fill(config, change)


def test_occupied_folder(whole, config, tmp_path, capsys):
    assert align(replace(config, out=str(whole))) == whole and "is done" in capsys.readouterr().out
    with pytest.raises(RunOccupied, match="kappa"): align(fill(config, dict(out=str(whole), kappa=1.)))
    (tmp_path/"mine.txt").write_text("somebody's file")
    with pytest.raises(RunOccupied, match="not empty"): align(replace(config, out=str(tmp_path)))


def test_checkpoint_of_another_shape(config, tiny, tmp_path):
    bad = tmp_path/"bad"
    save_pretrained(Policy(SmallUNet(UNetConfig((32, 16), (1, 1), 16))), bad)
    (bad/"model.safetensors").write_bytes((tiny/"model.safetensors").read_bytes())
    for name, folder, error, named in (("x", bad, ValueError, "bad/model.safetensors.*config.json"),
                                       ("y", tmp_path/"none", FileNotFoundError, "no policy .*none")):
        with pytest.raises(error, match=named): align(fill(config, dict(out=str(tmp_path/name), backbone=str(folder))))
        assert not (tmp_path/name).exists()


def test_defaults_are_the_validated_settings(root):
    "What the study ran, in its frozen file, is what the preset has by itself"
    ran = json.loads((root/"nbs"/"dp2o_study.json").read_text())["common"]
    preset = presets()["dp2o"][1]
    names = "kappa", "m", "n", "batch", "places", "sample_steps", "eval_m"
    assert fill(preset, {name: ran[name] for name in names}) == preset

"DP2O-SR end to end on a tiny network: killed and resumed, other forms, bad input, and the notebooks by papermill"
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import same_result

import srnb.training as training
from srnb.core import RunOccupied, generator, read_run, run_done, to_pil
from srnb.curation import finished_groups
from srnb.nets import SmallUNet, UNetConfig
from srnb.policies import Policy, save_pretrained
from srnb.rewards import MetricUnavailable
from srnb.training import DPORun, Loop, SFTRun, latest_checkpoint, train_dp2o, train_sft


@pytest.fixture(scope="module")
def config(tiny):
    return DPORun("", backbone=str(tiny), size=96, places=1, m=3, n=1, patch=32, groups=2, steps=2, eval_m=2, take=2, rank=2,
                  judges=("psnr_y",), precision="no", loop=Loop(steps=6, lr=1e-3, warmup=2, save_every=2, log_every=1, ema=.5))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    "A run that nobody disturbed"
    return train_dp2o(replace(config, out_dir=str(tmp_path_factory.mktemp("runs")/"whole")))


def test_record(whole, config):
    conf, metrics = read_run(whole)
    assert "out_dir" not in conf["params"] and conf["params"]["kappa"] == config.kappa and conf["versions"]["torch"]
    assert set(metrics.variant) == {"before", "after", "bicubic"} and set(metrics.metric) == {"reward", "st_lpips_alex", "gmsd", "piqe", "psnr_y", "moved"}
    assert (metrics[metrics.variant != "bicubic"].groupby(["metric", "variant", "image"]).size() == config.eval_m).all()
    log = pd.read_parquet(whole/"log.parquet")
    assert log.step.tolist() == [1, 2, 3, 4, 5, 6] and log.gap_w[0] == 0 and abs(log.loss[0]-0.6931) < 0.15  # ln 2 times the weights


def test_killed_and_resumed(whole, config, tmp_path, deadly):
    "Killed within curation, within training and within the last bank: nothing finished is done again, the result is the same"
    cfg, (count, calls, die) = replace(config, out_dir=str(tmp_path/"cut")), deadly
    count(Policy, "sample"), count(training, "group_batch")
    die.update(sample=1)
    with pytest.raises(KeyboardInterrupt, match="sample"): train_dp2o(cfg)
    assert len(finished_groups(tmp_path/"cut"/"bank")) == 1
    die.update(sample=-1, group_batch=3)
    with pytest.raises(KeyboardInterrupt, match="group_batch"): train_dp2o(cfg)
    assert latest_checkpoint(tmp_path/"cut").name == "checkpoint-00000002" and calls["sample"] == 4
    die.update(sample=5, group_batch=-1)
    with pytest.raises(KeyboardInterrupt, match="sample"): train_dp2o(cfg)
    die.update(sample=-1)
    same_result(train_dp2o(cfg), whole)
    assert calls == dict(sample=6, group_batch=3+4)  # 2 + 2 + 2 groups once; steps 0 1 2 | 2 3 4 5
    train_dp2o(cfg)
    assert calls == dict(sample=6, group_batch=3+4)  # done: nothing runs


def test_kill_9(whole, config, tmp_path):
    "The same through the command line, by SIGKILL at two moments; Accelerate's launcher finishes it"
    out = tmp_path/"killed"
    fields = {k: v for k, v in training.asdict(config).items()} | dict(run="dp2o", out_dir=str(out))
    (tmp_path/"config.json").write_text(json.dumps(fields))
    command = [sys.executable, "-m", "srnb.training", str(tmp_path/"config.json")]
    for moment in (lambda: (out/"bank"/"manifest.jsonl").exists(), lambda: latest_checkpoint(out) is not None):
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while run.poll() is None and not moment(): time.sleep(.01)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL # it did not end by itself
    assert latest_checkpoint(out) is not None and not run_done(out)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", *command[2:]]
    done = subprocess.run(launch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    same_result(out, whole)


@pytest.mark.parametrize("change", [dict(path="vp_eps", sampler="ddpm"), dict(path="vp_v", safeguard=True), dict(normaliser="global", hpo="none")],
                         ids=lambda o: "-".join(map(str, o.values())))
def test_forms(config, tmp_path, change):
    "One flow network as diffusion policy, the safeguard, the other normaliser: the whole way runs and starts at ln 2"
    out = train_dp2o(replace(config, out_dir=str(tmp_path/"run"), **change, loop=replace(config.loop, steps=2)))
    log = pd.read_parquet(out/"log.parquet")
    assert abs(log.loss[0]-0.6931) < 0.15 and log.drift[0] == 0 and log.drift[1] > 0 and len(read_run(out)[1])
    if change.get("safeguard"): assert (log.safeguard <= 1).all() and (log.safeguard > 0).all()
    if change.get("hpo") == "none": assert abs(log.loss[0]-0.6931) < 1e-4


def test_shared_banks(whole, config, tmp_path, monkeypatch):
    "Runs that draw the same candidates share them: the second samples only after its own training; sharing changes no result"
    calls, sample = [], Policy.sample
    monkeypatch.setattr(Policy, "sample", lambda *a, **k: calls.append(1) or sample(*a, **k))
    shared = replace(config, banks=str(tmp_path/"banks"))
    same_result(train_dp2o(replace(shared, out_dir=str(tmp_path/"a"))), whole)
    assert len(calls) == 6
    out = train_dp2o(replace(shared, out_dir=str(tmp_path/"b"), reward="offline_nr", judges=("gmsd", "st_lpips_alex")))
    assert len(calls) == 8 and set(read_run(out)[1].metric) == {"reward", "piqe", "gmsd", "st_lpips_alex", "moved"}
    m = read_run(out)[1].query("metric == 'moved'")
    assert (m[m.variant == "before"].value == 0).all() and (m[m.variant == "after"].value > 0).all()
    with pytest.raises(RunOccupied, match="policy"): train_dp2o(replace(shared, out_dir=str(tmp_path/"c"), path="vp_v"))


def test_own_photographs(config, tmp_path):
    "Folders instead of the embedded set; one that leaks is refused"
    g, folder = generator(1), tmp_path/"photos"
    folder.mkdir()
    for i in range(8): to_pil(torch.rand(3, 12, 12, generator=g).repeat_interleave(8, 1).repeat_interleave(8, 2)).save(folder/f"{i}.png")
    train, test = training.photo_sets((str(folder),), ())
    assert len(train)+len(test) == 8 and train and test and not {p.sha256 for p in train} & {p.sha256 for p in test}
    with pytest.raises(ValueError, match="held out"): training.photo_sets((str(folder),), (str(folder),))


# ---------------------------------------------------------------- bad input

def test_metric_that_cannot_be_had(config, tmp_path, monkeypatch, offline):
    "Named, with the preset that works, before anything is sampled or written"
    monkeypatch.setattr(Policy, "sample", lambda *a, **k: pytest.fail("sampled before the metrics were checked"))
    with pytest.raises(MetricUnavailable, match="offline"): train_dp2o(replace(config, out_dir=str(tmp_path/"x"), reward="dp2o"))
    assert not (tmp_path/"x").exists()


@pytest.mark.parametrize("change, message", [(dict(n=2), "N = 2, M = 3"), (dict(m=1), "M = 1"), (dict(kappa=0.), "kappa must be positive"),
    (dict(reward="musiq"), "reward must be one of offline, offline_fr, offline_nr, dp2o"), (dict(patch=128), "larger than the candidates"), (dict(places=9), "places")])
def test_config(config, change, message):
    with pytest.raises(ValueError, match=message): replace(config, **change)


def test_occupied_folder(whole, config, tmp_path, capsys):
    assert train_dp2o(replace(config, out_dir=str(whole))) == whole and "is done" in capsys.readouterr().out
    with pytest.raises(RunOccupied, match="kappa"): train_dp2o(replace(config, out_dir=str(whole), kappa=1.))
    (tmp_path/"mine.txt").write_text("somebody's file")
    with pytest.raises(RunOccupied, match="not empty"): train_dp2o(replace(config, out_dir=str(tmp_path)))


def test_checkpoint_of_another_shape(config, tiny, tmp_path):
    bad = tmp_path/"bad"
    save_pretrained(Policy(SmallUNet(UNetConfig((32, 16), (1, 1), 16))), bad)
    (bad/"model.safetensors").write_bytes((tiny/"model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="does not fit its config.json"): train_dp2o(replace(config, out_dir=str(tmp_path/"x"), backbone=str(bad)))
    with pytest.raises(FileNotFoundError, match="give a folder"): train_dp2o(replace(config, out_dir=str(tmp_path/"y"), backbone=str(tmp_path/"none")))


def test_bad_photographs(config, tmp_path):
    folder = tmp_path/"photos"
    folder.mkdir()
    with pytest.raises(ValueError, match="holds no image"): training.photo_sets((str(folder),), ())
    to_pil(torch.rand(3, 40, 40, generator=generator(0))).save(folder/"small.png")
    with pytest.raises(ValueError, match="40.*less than the crop of 96"):
        train_dp2o(replace(config, out_dir=str(tmp_path/"x"), photos=(str(folder),), held_out=(str(training.embedded_photos()[0].path.parent),), take=1))
    (folder/"cut.png").write_bytes((folder/"small.png").read_bytes()[:200])
    with pytest.raises(ValueError, match="cut.png"): training.photo_sets((str(folder),), ())


def test_sft_refuses_held_out(tmp_path):
    held = training.embedded_photos("held_out")[0]
    with pytest.raises(ValueError, match="held out"): train_sft(SFTRun(str(tmp_path/"x"), (str(held.path.parent),)))


# ---------------------------------------------------------------- the notebooks

def papermill(root, name, tmp_path, *args, **env):
    return subprocess.run([sys.executable, "-m", "papermill", f"nbs/{name}.ipynb", str(tmp_path/"out.ipynb"), "--log-output", "--no-progress-bar", *args],
                          cwd=root, env=dict(os.environ, IN_TEST="1", **env), capture_output=True, text=True)


@pytest.mark.parametrize("name", ["train_dp2o", "train_sft", "train_dp2o_study", "train_asasr", "train_study", "train_dro", "train_ctmsr", "compare_upscalers"])
def test_papermill(root, name, tmp_path):
    run = papermill(root, name, tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert (tmp_path/"out.ipynb").exists()


def test_study_of_methods(root, tmp_path):
    "The study of all methods in miniature: two rows, their record, and the picture of crops"
    run = papermill(root, "train_study", tmp_path, "-p", "study", "nbs/methods_study.json")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "recorded 2 runs" in run.stderr + run.stdout


def test_papermill_names_the_metric(root, tmp_path):
    nowhere = dict(HTTPS_PROXY="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9", HF_HOME=str(tmp_path), TORCH_HOME=str(tmp_path))
    run = papermill(root, "train_dp2o", tmp_path, "-p", "reward", "dp2o", **nowhere)
    assert run.returncode != 0 and "MetricUnavailable" in run.stderr and "offline" in run.stderr

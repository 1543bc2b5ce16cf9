"CTMSR end to end on a tiny network: killed and resumed, shared stages, bad input; the shipped one-step network"
import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import srnb.onestep as onestep
from srnb.core import RunOccupied, bicubic, read_run
from srnb.curation import fingerprint
from srnb.data import embedded_photos, make_pair
from srnb.degrade import RESSHIFT_TRAIN
from srnb.onestep import ONESTEP, RUNS, CTMSRRun, train_ctmsr
from srnb.paths import Shift
from srnb.policies import PixelCodec, from_pretrained
from srnb.rewards import ST_LPIPS_VGG, score
from srnb.training import Loop, check_unseen, from_config


@pytest.fixture(scope="module")
def config():
    few = Loop(steps=4, lr=1e-3, warmup=2, save_every=2, log_every=1, ema=.9)
    return CTMSRRun("", degradation="resshift_test", versions=1, max_side=160, channels=(16, 16), blocks=(1, 1), tail=8, patch=48, window=32, batch=2,
                    size=96, eval_m=2, judges=("psnr_y",), refresh=2, take=2, precision="no", loop=few, match_loop=replace(few, steps=5, save_every=1))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    "A run that nobody disturbed"
    return train_ctmsr(replace(config, out_dir=str(tmp_path_factory.mktemp("runs")/"whole")))


def same(a, b):
    x, y = (load_file(o/"policy"/"model.safetensors") for o in (a, b))
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    assert read_run(a)[1].equals(read_run(b)[1]) and pd.read_parquet(a/"log.parquet").equals(pd.read_parquet(b/"log.parquet"))


def test_record(whole):
    conf, metrics = read_run(whole)
    assert conf["params"]["match"] == "dtm" and not {"out_dir", "banks"} & set(conf["params"])
    assert set(metrics.metric) == {"psnr_y", "spread"} and set(metrics.variant) == {"sr", "bicubic"} and metrics.image.nunique() == 2
    log = pd.read_parquet(whole/"log.parquet")
    assert log.stage.tolist() == [1]*4 + [2]*5 and log[log.stage == 2].match.gt(0).all()
    policy = from_pretrained(whole/"policy")
    assert policy.path == Shift() and isinstance(policy.codec, PixelCodec)
    seen = set(json.loads((whole/"policy"/"photos.json").read_text()))
    assert seen == {p.sha256 for p in embedded_photos("train")[:2]}


@pytest.mark.parametrize("after", [(1, 2), (5, 1), (8,), (2, 3, 2)])
def test_killed_and_resumed(whole, config, tmp_path, deadly, after):
    "Killed after so many more batches, in either stage and around a refresh of the teacher: the same weights, log and metrics"
    count, calls, die = deadly
    count(onestep, "onestep_batch")
    cfg = replace(config, out_dir=str(tmp_path/"cut"))
    for n in after:
        die["onestep_batch"] = calls["onestep_batch"] + n
        with pytest.raises(KeyboardInterrupt): train_ctmsr(cfg)
    die.clear()
    same(train_ctmsr(cfg), whole)
    again = dict(calls)
    train_ctmsr(cfg) # done: nothing is drawn
    assert calls == again


def test_teacher_is_refreshed(config, whole, tmp_path):
    "A teacher that is never refreshed gives other weights; so does the weight on the loss"
    rows = [train_ctmsr(replace(config, out_dir=str(tmp_path/str(i)), **change)) for i, change in enumerate((dict(refresh=1000), dict(weight_inside=False)))]
    logs = [pd.read_parquet(o/"log.parquet").query("stage == 2") for o in (whole, *rows)]
    assert logs[0].match.iloc[:2].tolist() == logs[1].match.iloc[:2].tolist() # the same until the first refresh
    assert logs[0].match.iloc[-1] != logs[1].match.iloc[-1] and logs[0].match.iloc[0] != logs[2].match.iloc[0]


def test_stage_one_is_shared(config, tmp_path):
    shared, calls = dict(banks=str(tmp_path/"shared")), []
    for match in ("none", "sds"): calls.append(train_ctmsr(replace(config, out_dir=str(tmp_path/match), match=match, **shared)))
    train_ctmsr(replace(config, out_dir=str(tmp_path/"regression"), match="none", first=1, last=1, **shared))
    assert len(list((tmp_path/"shared").glob("stage1-*"))) == 2 # one for both rows of the same stage 1, one for regression
    photos = tmp_path/"photos" # other held-out photographs leave others for training: no shared stage 1
    photos.mkdir()
    for p in embedded_photos("train")[:6]: (photos/p.path.name).write_bytes(p.path.read_bytes())
    train_ctmsr(replace(config, out_dir=str(tmp_path/"split"), match="none", photos=(str(photos),), take=0, **shared))
    assert len(list((tmp_path/"shared").glob("stage1-*"))) == 3
    a, b = (pd.read_parquet(o/"log.parquet") for o in calls)
    assert a[a.stage == 1].consistency.tolist() == b[b.stage == 1].consistency.tolist() and a.consistency.iloc[4] == b.consistency.iloc[4]


def test_another_config_is_refused(whole, config):
    with pytest.raises(RunOccupied, match="match_weight"): train_ctmsr(replace(config, out_dir=str(whole), match_weight=1.))


def test_a_photograph_that_the_start_has_seen_is_refused(whole, config, tmp_path):
    for name, photos in (("seen", embedded_photos("train")[:2]), ("other", embedded_photos("train")[3:4])):
        (tmp_path/name).mkdir()
        for p in photos: (tmp_path/name/p.path.name).write_bytes(p.path.read_bytes())
    cfg = replace(config, out_dir=str(tmp_path/"x"), init=str(whole/"policy"), channels=(64, 128, 128), blocks=(4, 2, 2), tail=32, photos=(str(tmp_path/"other"),), held_out=(str(tmp_path/"seen"),))
    with pytest.raises(ValueError, match="was in the training of"): train_ctmsr(cfg)
    assert not (tmp_path/"x").exists()


def test_command_line(config, tmp_path, forked):
    "python -m srnb.onestep config.json"
    few = dict(steps=1, save_every=1, log_every=1, warmup=1)
    fields = dict(run="ctmsr", out_dir=str(tmp_path/"a"), degradation="resshift_test", versions=1, max_side=100, channels=[16, 16], blocks=[1, 1], tail=8, patch=32,
                  window=32, batch=1, size=64, eval_m=1, judges=["psnr_y"], take=2, precision="no", loop=few, match_loop=few)
    (tmp_path/"c.json").write_text(json.dumps(fields))
    run = forked("-m", "srnb.onestep", tmp_path/"c.json")
    assert run.wait() == 0, run.err
    assert (tmp_path/"a"/"metrics.parquet").exists()
    assert from_config(dict(run="dp2o", out_dir="x"), RUNS)[1].kappa == 1000. # the other runs are known as well
    with pytest.raises(ValueError, match="run must be one of sft, dp2o, asasr"): from_config(fields)


# ---------------------------------------------------------------- the shipped network

def test_records_are_of_the_shipped_weights(root):
    "What README and card say was measured on the weights that ship, and on no others"
    policy = from_pretrained("onestep", dtype=torch.bfloat16)
    for name in ("onestep_kodak", "onestep_held_out"):
        assert json.loads((root/"nbs/_records"/name/"models.json").read_text())["onestep"] == fingerprint(policy)
    with torch.no_grad(): policy.net.tail.bias[0] += 1e-3
    assert fingerprint(policy) != json.loads((root/"nbs/_records/onestep_kodak/models.json").read_text())["onestep"]


def test_shipped_network():
    "Loads, is small, has seen no embedded photograph, and looks closer to the truth than bicubic"
    assert (ONESTEP/"model.safetensors").stat().st_size < 10e6 and (ONESTEP/"README.md").exists()
    check_unseen(ONESTEP, embedded_photos())
    policy, ratio = from_pretrained("onestep"), []
    for p in embedded_photos("held_out")[:4]:
        lq, gt = make_pair(p, 192, RESSHIFT_TRAIN)
        sr, y = policy.sample(lq[None], [0])[0], bicubic(lq[None], gt.shape[-2:])
        ratio.append(score(ST_LPIPS_VGG, sr, gt)/score(ST_LPIPS_VGG, y, gt))
    assert torch.cat(ratio).mean() < .9

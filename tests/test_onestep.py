"CTMSR end to end on a tiny network: killed and resumed, shared stages, bad input; the shipped one-step network"
import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import srnb.onestep
from srnb.config import fill, record
from srnb.core import RunOccupied, bicubic, read_run
from srnb.curation import fingerprint
from srnb.data import embedded_photos, make_pair
from srnb.degrade import RESSHIFT_TEST, RESSHIFT_TRAIN
from srnb.nets import OneStepConfig
from srnb.onestep import CTMSRRun, Match, train_ctmsr
from srnb.paths import Shift
from srnb.policies import PixelCodec, from_pretrained, policy_folder
from srnb.rewards import ST_LPIPS_VGG, score
from srnb.runs import check_unseen
from srnb.train import from_json, presets
from srnb.training import Loop


@pytest.fixture(scope="module")
def config():
    few = Loop(steps=4, lr=1e-3, warmup=2, save_every=2, log_every=1, ema=.9)
    match = Match(refresh=2, match_loop=replace(few, steps=5, save_every=1))
    net = OneStepConfig((16, 16), (1, 1), tail=8)
    return CTMSRRun("", degradation=RESSHIFT_TEST, versions=1, max_side=160, net=net, patch=48, window=32, batch=2,
                    size=96, eval_m=2, judges=("psnr_y",), take=2, precision="no", loop=few, match=match)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    "A run that nobody disturbed"
    return train_ctmsr(replace(config, out=str(tmp_path_factory.mktemp("runs")/"whole")))


def same(a, b):
    x, y = (load_file(o/"policy"/"model.safetensors") for o in (a, b))
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    assert read_run(a)[1].equals(read_run(b)[1])
    assert pd.read_parquet(a/"log.parquet").equals(pd.read_parquet(b/"log.parquet"))


def copied(photos, folder):
    "A folder of copies, of which nothing but the content tells what they are"
    folder.mkdir()
    for p in photos: (folder/p.path.name).write_bytes(p.path.read_bytes())
    return str(folder)


def test_record(whole):
    conf, metrics = read_run(whole)
    said = conf["params"]["config"]
    assert said["match"]["gap"] == "dtm" and not {"out", "banks"} & set(said)
    assert set(metrics.metric) == {"psnr_y", "spread"} and set(metrics.variant) == {"sr", "bicubic"}
    assert metrics.image.nunique() == 2
    log = pd.read_parquet(whole/"log.parquet")
    assert log.stage.tolist() == [1]*4 + [2]*5 and log[log.stage == 2].match.gt(0).all()
    policy = from_pretrained(whole/"policy")
    assert policy.path == Shift() and isinstance(policy.codec, PixelCodec)
    seen = set(json.loads((whole/"policy"/"photos.json").read_text()))
    assert seen == {p.sha256 for p in embedded_photos("train")[:2]}


@pytest.mark.parametrize("after", [(1, 2), (5, 1), (8,), (2, 3, 2)], ids=str)
def test_killed_and_resumed(whole, config, tmp_path, deadly, after):
    """Killed after so many more batches, in either stage and around a refresh of the teacher: the same weights, log and
    metrics"""
    count, calls, die = deadly
    count(srnb.onestep, "onestep_batch")
    run = replace(config, out=str(tmp_path/"cut"))
    for n in after:
        die["onestep_batch"] = calls["onestep_batch"] + n
        with pytest.raises(KeyboardInterrupt): train_ctmsr(run)
    die.clear()
    same(train_ctmsr(run), whole)
    again = dict(calls)
    train_ctmsr(run) # done: nothing is drawn
    assert calls == again


def test_teacher_is_refreshed(config, whole, tmp_path):
    "A teacher that is never refreshed gives other weights; so does the weight on the loss"
    changes = dict(never=dict(refresh=1000), outside=dict(inside=False))
    rows = [train_ctmsr(fill(config, dict(change, out=str(tmp_path/n)))) for n, change in changes.items()]
    match = [pd.read_parquet(o/"log.parquet").query("stage == 2").match.tolist() for o in (whole, *rows)]
    assert match[0][:2] == match[1][:2] # the same until the first refresh
    assert match[0][-1] != match[1][-1] and match[0][0] != match[2][0]


def test_stage_one_is_shared(config, tmp_path):
    banks = tmp_path/"shared"
    def made(name, **change):
        out = train_ctmsr(fill(config, dict(change, out=str(tmp_path/name), banks=str(banks))))
        return pd.read_parquet(out/"log.parquet"), len(list(banks.glob("stage1-*")))
    (a, n), (b, m) = (made(gap, gap=gap) for gap in ("none", "sds"))
    assert n == m == 1 # one for both rows of the same stage 1
    assert a[a.stage == 1].consistency.tolist() == b[b.stage == 1].consistency.tolist()
    assert a.consistency.iloc[4] == b.consistency.iloc[4]
    assert made("regression", gap="none", first=1, last=1)[1] == 2
    photos = copied(embedded_photos("train")[:6], tmp_path/"photos")
    # other held-out photographs leave others for training: no shared stage 1
    assert made("split", gap="none", photos=[photos], take=0)[1] == 3


def test_no_teacher_without_a_gap(config, tmp_path, monkeypatch):
    "Nothing is copied for one, in memory or on the disk"
    monkeypatch.setattr(srnb.onestep, "deepcopy", lambda o: pytest.fail("copied"))
    out = train_ctmsr(fill(config, dict(gap="none", out=str(tmp_path/"run"))))
    assert len(pd.read_parquet(out/"log.parquet")) == 9 and not (out/"stage2"/"kept").exists()


def test_another_config_is_refused(whole, config):
    run = fill(config, {"out": str(whole), "match.weight": 1.})
    with pytest.raises(RunOccupied, match="match.weight"): train_ctmsr(run)


def test_a_photograph_that_the_start_has_seen_is_refused(whole, config, tmp_path):
    seen = copied(embedded_photos("train")[:2], tmp_path/"seen")
    other = copied(embedded_photos("train")[3:4], tmp_path/"other")
    run = replace(config, out=str(tmp_path/"x"), init=str(whole/"policy"), net=CTMSRRun.net, photos=(other,),
                  held_out=(seen,))
    with pytest.raises(ValueError, match="was in the training of"): train_ctmsr(run)
    assert not (tmp_path/"x").exists()


@pytest.mark.parametrize("change, named", [
    (dict(gap="dmd"), "gap.*'dmd'.*dtm"), (dict(first=2), "first = 2, last = 4"), (dict(first=1, last=1), "last.*2"),
    (dict(lpips_weight=2.), "lpips_weight.*2"), (dict(window=8), "window.*8"), (dict(window=100), "window.*48.*100"),
    (dict(refresh=0), "refresh.*0"), (dict(eval_m=0), "eval_m.*0"), (dict(batch=0), "batch.*0"),
    (dict(versions=-1), "versions.*-1"), (dict(judges=[]), "judges"), (dict(judges=["psnr"]), "judges.*'psnr'"),
    (dict(init="onestep"), "net"), (dict(channels=[16]), r"\(16,\)"), (dict(degradation="blur"), "degradation.*'blur'"),
    (dict(photos="nowhere"), "nowhere"), (dict(precision="fp8"), "precision.*'fp8'")])
def test_config(config, change, named):
    with pytest.raises((ValueError, FileNotFoundError), match=named): fill(replace(config, last=4), change)


def test_refused_before_any_work(config, tmp_path):
    for change, named in ((dict(patch=50), "stride.*50"), (dict(size=100), "8.*100"), (dict(init="small"), "'small'")):
        run = replace(config, net=CTMSRRun.net) if "init" in change else config
        with pytest.raises(ValueError, match=named): train_ctmsr(fill(run, dict(change, out=str(tmp_path/"x"))))
    assert not (tmp_path/"x").exists()


def test_command_line(config, tmp_path, forked):
    "python -m srnb.train config.json"
    few = replace(config.loop, steps=1)
    run = replace(config, out=str(tmp_path/"a"), max_side=100, patch=32, batch=1, size=64, eval_m=1, loop=few,
                  match=replace(config.match, match_loop=few))
    said = dict(run="CTMSRRun", config=record(run))
    assert from_json(said) == run
    (tmp_path/"c.json").write_text(json.dumps(said))
    done = forked("-m", "srnb.train", tmp_path/"c.json")
    assert done.wait() == 0, done.err
    assert done.out.splitlines()[-1] == str(tmp_path/"a") and (tmp_path/"a"/"metrics.parquet").exists()
    assert presets()["dp2o"][1].method.link.kappa == 1000. # the other runs are known as well
    with pytest.raises(ValueError, match="'ctmsr'.*CTMSRRun"): from_json(dict(said, run="ctmsr"))


# ---------------------------------------------------------------- the shipped network

def test_records_are_of_the_shipped_weights(root):
    "What README and card say was measured on the weights that ship, and on no others"
    policy = from_pretrained("onestep", dtype=torch.bfloat16)
    def recorded(name): return json.loads((root/"nbs/_records"/name/"models.json").read_text())["onestep"]
    assert recorded("onestep_held_out") == fingerprint(policy)
    with torch.no_grad(): policy.net.last.bias[0] += 1e-3
    assert fingerprint(policy) != recorded("onestep_held_out")


def test_shipped_network():
    "Loads, is small, has seen no held-out photograph, and looks closer to the truth than bicubic"
    folder = policy_folder("onestep")
    assert (folder/"model.safetensors").stat().st_size < 10e6 and (folder/"README.md").exists()
    check_unseen("onestep", embedded_photos("held_out"))
    policy, ratio = from_pretrained("onestep"), []
    for p in embedded_photos("held_out")[:4]:
        lq, gt = make_pair(p, 192, RESSHIFT_TRAIN)
        sr, y = policy.sample(lq[None], [0])[0], bicubic(lq[None], gt.shape[-2:])
        ratio.append(score(ST_LPIPS_VGG, sr, gt)/score(ST_LPIPS_VGG, y, gt))
    assert torch.cat(ratio).mean() < .75

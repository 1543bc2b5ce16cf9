"DP2O-SR end to end on a tiny network: killed and resumed, other forms, bad input, and the notebooks by papermill"
import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import same_result
from forks import cut

import srnb.training as training
from srnb.core import RunOccupied, generator, open_run, read_run, run_done, to_pil, write_image
from srnb.curation import finished_groups, read_group
from srnb.data import PatchPool
from srnb.degrade import RESSHIFT_TEST
from srnb.nets import SmallUNet, UNetConfig
from srnb.onestep import CTMSRRun, train_ctmsr
from srnb.paths import Shift
from srnb.policies import Policy, from_pretrained, save_pretrained
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


@pytest.mark.parametrize("run", ["sft", "dp2o", "asasr", "align", "ctmsr"])
@pytest.mark.parametrize("fast, name", [(torch.bfloat16, "bf16"), (torch.float32, "no")])
def test_the_record_names_the_precision(run, fast, name, monkeypatch, tmp_path):
    "Auto is what the machine does fast; what was written down stays, and another machine's record is not mixed with this one's"
    from srnb.align import RUNS
    monkeypatch.setattr(training, "usual_dtype", lambda: fast)
    make = RUNS[run][0]
    assert make("x").precision == name == training.record_of(replace(make("x"), seed=1))["precision"]
    assert make("x", precision="bf16").precision == "bf16" and make("x", precision="no").precision == "no"
    with pytest.raises(ValueError, match="precision must be one of no, bf16; got 'fp16'"): make("x", precision="fp16")
    open_run(tmp_path/"run", training.record_of(make("x")))
    monkeypatch.setattr(training, "usual_dtype", lambda: torch.float32 if name == "bf16" else torch.bfloat16)
    with pytest.raises(RunOccupied, match="precision"): open_run(tmp_path/"run", training.record_of(make("x")))


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


def test_kill_9(whole, config, tmp_path, forked):
    "The same through the command line, by SIGKILL while the bank is drawn and after a checkpoint"
    out, path = tmp_path/"killed", tmp_path/"config.json"
    path.write_text(json.dumps(training.asdict(config) | dict(run="dp2o", out_dir=str(out))))
    for name, call in (("srnb.policies.Policy.sample", 1), ("srnb.training.group_batch", 3)):
        run = forked(cut, name, call, .01, training.main, [str(path)])
        assert run.wait() == -signal.SIGKILL, run.err
        assert (out/"bank"/"manifest.jsonl").exists() and not run_done(out)
    assert latest_checkpoint(out) is not None
    done = forked("-m", "srnb.training", path)
    assert done.wait() == 0, done.err
    same_result(out, whole)


@pytest.mark.parametrize("change", [dict(path="vp_eps", sampler="ddpm"), dict(path="vp_v", sampler="ab2", safeguard=True), dict(normaliser="global", hpo="none")],
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
    (tmp_path/"one").mkdir()
    to_pil(torch.rand(3, 96, 96, generator=g)).save(tmp_path/"one"/"one.png")
    with pytest.raises(ValueError, match="at least 2 held out"): training.photo_sets((str(folder),), (str(tmp_path/"one"),))


# ---------------------------------------------------------------- a file of one's own

MINE = """
from dataclasses import dataclass
import torch
from torch import nn
from srnb.core import bicubic
from srnb.nets import NETS
from srnb.paths import Shift
from srnb.policies import PixelCodec, Policy
from srnb.rewards import PSNR_Y, Metric, Reward

def averaged(gt, generator, scale): return nn.functional.avg_pool2d(gt, scale)*STRENGTH
STRENGTH = 1.
BRIGHT = Metric("bright", "nr", True, lambda: lambda sr, gt: sr.mean((1, 2, 3)))
REWARD = Reward("mine", fr=(PSNR_Y,), nr=(BRIGHT,))
OTHER = Metric("psnr_y", "nr", True, BRIGHT.build)

@dataclass(frozen=True)
class MineConfig:
    width:int = 8
    scale:int = 4

class Mine(nn.Module):
    stride, lora_targets = 4, ("middle",)
    def __init__(self, config=MineConfig()):
        super().__init__()
        self.config, w = config, config.width
        self.head, self.middle, self.tail = nn.Conv2d(6, w, 3, padding=1), nn.Conv2d(w, w, 3, padding=1), nn.Conv2d(w, 3, 3, padding=1)
    def forward(self, x, sigma, lq): return self.tail(self.middle(self.head(torch.cat([x, bicubic(lq, x.shape[-2:])], 1)).relu()).relu())

NETS["Mine"] = Mine, MineConfig
class Unknown(Mine): pass
def base(): return Policy(Mine())
POLICY = Policy(Mine())
def shift(): return Policy(Mine(), Shift(), Shift(), PixelCodec())
def lost(): return Policy(Unknown())
def net(): return Mine()
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    "The working folder holds my.py"
    monkeypatch.chdir(tmp_path)
    (tmp_path/"my.py").write_text(MINE)
    return tmp_path/"my.py"


def test_own_policy_is_the_same_at_every_call(mine):
    before = torch.get_rng_state()
    for name in ("base", "POLICY"):
        a, b = (training.small_policy("backbone", f"my.py:{name}", torch.float32) for _ in range(2))
        assert torch.equal(before, torch.get_rng_state())
        assert a is not b and a.net is not b.net and all(torch.equal(p, q) and p is not q for p, q in zip(a.net.parameters(), b.net.parameters(), strict=True))
        a.add_lora(2)
        assert not training.small_policy("backbone", f"my.py:{name}", torch.float32).adapters
        torch.set_rng_state(before) # PEFT draws


def test_own_file(config, mine, capsys, forked):
    "Degradation, reward, metric and network by name: another process ends with the same result; a file that has changed is another run"
    cfg = replace(config, out_dir="run", backbone="my.py:base", degradation="my.py:averaged", reward="my.py:REWARD", judges=("gmsd", "my.py:BRIGHT"), loop=replace(config.loop, steps=3))
    conf, metrics = read_run(train_dp2o(cfg))
    digest = hashlib.sha256(mine.read_bytes()).hexdigest()
    assert set(metrics.metric) == {"reward", "psnr_y", "bright", "gmsd", "moved"}
    assert [conf["params"][f"{k}_sha256"] for k in ("backbone", "degradation", "reward", "judges")] == [digest]*3+[[digest]]
    group = read_group("run/bank", finished_groups("run/bank")[0])
    assert torch.equal(group.lq, torch.nn.functional.avg_pool2d(group.gt, 4).mul(255).round().div(255))
    Path("config.json").write_text(json.dumps(dict(training.asdict(cfg), run="dp2o", out_dir="other")))
    other = forked("-m", "srnb.training", "config.json")
    assert other.wait() == 0, other.err
    same_result(Path("other"), Path("run"))
    mine.write_text(MINE.replace("STRENGTH = 1.", "STRENGTH = .5"))
    assert train_dp2o(cfg) == Path("run") and "is done" in capsys.readouterr().out # this config has read the file before
    with pytest.raises(RunOccupied, match="degradation_sha256"): train_dp2o(replace(cfg))
    mine.write_text(MINE)
    assert train_dp2o(replace(cfg)) == Path("run")


def test_own_network_is_trained(config, mine):
    "Supervised and as a one-step network; what is written is a base like any other"
    few = dict(versions=1, max_side=160, patch=36, batch=2, seed=1)
    sft = SFTRun("sft", init="my.py:base", degradation="my.py:averaged", **few, loop=replace(config.loop, steps=20, lr=1e-2, ema=0.))
    log = pd.read_parquet(train_sft(sft)/"log.parquet")
    assert "mean" not in log and log.loss.iloc[-5:].mean() < log.loss.iloc[:3].mean() and json.loads(Path("sft/config.json").read_text())["params"]["init_sha256"]
    policy = from_pretrained("sft/policy")
    _, logs = training.sft_loss(PatchPool(training.embedded_photos("train")[:1], RESSHIFT_TEST, 1, 160), policy, 2, 32, 0)(policy.net, 0, 0)
    assert set(logs) == {"flow"} and 0 < logs["flow"] < 100
    assert len(read_run(train_dp2o(replace(config, out_dir="dp2o", backbone="sft/policy", loop=replace(config.loop, steps=1))))[1])
    one = train_ctmsr(CTMSRRun("one", init="my.py:shift", degradation="my.py:averaged", **few | dict(patch=32), window=32, size=64, eval_m=2, judges=("psnr_y", "my.py:BRIGHT"), take=2, precision="no",
                               refresh=1, loop=replace(config.loop, steps=2), match_loop=replace(config.loop, steps=2)))
    assert set(read_run(one)[1].metric) == {"psnr_y", "bright", "spread"} and isinstance(from_pretrained(one/"policy").path, Shift)


@pytest.mark.parametrize("change, message", [(dict(degradation="my.py:nothing"), "my.py has no 'nothing'"), (dict(reward="my.py:BRIGHT"), "must be a Reward, got a Metric"),
    (dict(judges=("my.py:base",)), "must be a Metric, got a function"), (dict(degradation="my.py:STRENGTH"), "must be a Degradation or Callable, got a float"), (dict(reward="my.py"), "NAME; got 'my.py'"),
    (dict(hpo="my.py:BRIGHT"), "hpo must be one of none, intra, inter, both; got")])
def test_own_file_that_does_not_fit(config, mine, change, message):
    with pytest.raises(ValueError, match=message): replace(config, **change)


def test_own_file_refused_before_any_work(config, mine, monkeypatch):
    monkeypatch.setattr(Policy, "sample", lambda *a, **k: pytest.fail("sampled"))
    with pytest.raises(FileNotFoundError, match="reward: no file at your.py"): replace(config, reward="your.py:REWARD")
    with pytest.raises(ValueError, match="two metrics are called 'psnr_y'"): train_dp2o(replace(config, out_dir="x", reward="my.py:REWARD", judges=("my.py:OTHER",)))
    with pytest.raises(ValueError, match="must be a Policy, or a function without arguments that gives one; it is, or gives, a Mine"): train_dp2o(replace(config, out_dir="x", backbone="my.py:net"))
    with pytest.raises(ValueError, match=r"could not be read back .*'Unknown'.*NETS\['Unknown'\] = Unknown"): train_sft(SFTRun("x", init="my.py:lost", versions=1, max_side=160))
    assert not Path("x").exists()


def test_ready_pairs(config, tmp_path):
    "A folder with lq and gt in place of photographs: the run's inputs are the files"
    for k, p in enumerate(training.embedded_photos("train")[:5]):
        gt = p.read()[:, :96, :96]
        for name, image in (("gt", gt), ("lq", gt[:, ::4, ::4])): write_image(tmp_path/("held" if k > 2 else "train")/name/f"{p.id}.png", image)
    out = train_dp2o(replace(config, out_dir=str(tmp_path/"run"), photos=(str(tmp_path/"train"),), held_out=(str(tmp_path/"held"),), take=0, loop=replace(config.loop, steps=1)))
    for bank, n in (("bank", 3), ("after", 2)):
        groups = [read_group(out/bank, i) for i in finished_groups(out/bank)]
        assert len(groups) == n and all(torch.equal(g.lq, g.gt[:, ::4, ::4]) for g in groups)


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


# ---- test_notebooks.py runs each once in a warm process; these start papermill and its kernel

@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_sft", "train_study", "train_ctmsr"]) # tests/test_readme.py runs the others
def test_papermill(root, name, tmp_path):
    run = papermill(root, name, tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert (tmp_path/"out.ipynb").exists()


@pytest.mark.slow
def test_a_study_over_two_machines(root, tmp_path):
    "Each leaves only its record behind; the second one adds its runs, repeats none, and refuses another study's record"
    record, runs = tmp_path/"record", []
    for rows in ("flow", "flow;NR only"):
        run = papermill(root, "train_dp2o_study", tmp_path, "-p", "rows", rows, "-p", "record_dir", str(record))
        assert run.returncode == 0, run.stderr[-3000:]
        runs.append((json.loads((record/"runs.json").read_text()), pd.read_parquet(record/"metrics.parquet"), (record/"changes.jpg").read_bytes()))
        assert "1 of 1: " in run.stdout + run.stderr
    (one, first, picture), (both, metrics, later) = runs
    assert [o["run"] for o in both] == ["flow, seed 0", "NR only, seed 0"] and both[:1] == one and picture == later
    pd.testing.assert_frame_equal(metrics[metrics.row == "flow"].astype(first.dtypes), first, check_categorical=False)
    assert set(metrics.row) == {"flow", "NR only"} and not metrics.duplicated(["row", "training", "image", "seed", "metric", "variant"]).any()
    run = papermill(root, "train_dp2o_study", tmp_path, "-p", "held_out", "srnb/photos", "-p", "record_dir", str(record))
    assert run.returncode != 0 and "is not the record of this study" in run.stderr


@pytest.mark.slow
def test_study_of_methods(root, tmp_path):
    "The study of all methods in miniature: two rows, their record, and the picture of crops"
    run = papermill(root, "train_study", tmp_path, "-p", "study", "nbs/methods_study.json")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "recorded 2 runs" in run.stderr + run.stdout


@pytest.mark.slow
def test_papermill_names_the_metric(root, tmp_path):
    nowhere = dict(HTTPS_PROXY="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9", HF_HOME=str(tmp_path), TORCH_HOME=str(tmp_path))
    run = papermill(root, "train_dp2o", tmp_path, "-p", "reward", "dp2o", **nowhere)
    assert run.returncode != 0 and "MetricUnavailable" in run.stderr and "offline" in run.stderr


def test_defaults_are_the_validated_settings(root):
    "What the study ran, in its frozen file, is what a config has by itself"
    ran = json.loads((root/"nbs"/"dp2o_study.json").read_text())["common"]
    for name in ("kappa", "m", "n", "groups", "places", "steps", "eval_m"): assert getattr(DPORun("x"), name) == ran[name], name

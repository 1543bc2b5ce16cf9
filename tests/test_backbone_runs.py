"""From a random SD, SDXL and FLUX to an aligned adapter: `srnb train base`, then DP2O, ASASR and DRO on its branch,
each killed once and resumed; the adapter in plain diffusers makes the same picture"""
import json
from pathlib import Path

import forks
import pytest
import torch
from conftest import same_result
from safetensors.torch import load_file
from test_backbones import in_diffusers, latents_of

import srnb.training
from srnb.backbones import BackboneOptions, load_backbone, write_tiny
from srnb.command import main
from srnb.core import check_close, generator, quantize
from srnb.policies import load_adapter
from srnb.train import read_config
from srnb.training import latest_checkpoint

pytestmark = pytest.mark.slow
KINDS = "sd", pytest.param("sdxl", marks=pytest.mark.repeat), "flux" # SDXL's network is SD's, with more conditions
METHODS = "dp2o", "asasr", "dro"
ALIGNED_RUNS = ("sd", "dp2o"), ("sd", "asasr"), ("flux", "asasr"), ("flux", "dro") # each kind, each method
BASE = dict(versions=0, max_side=160, batch=1, precision="no", steps=8, lr=1e-2, warmup=1, ema=.5, save_every=3,
            log_with="none")
ALIGNED = dict(size=64, places=1, take=2, sample_steps=1, eval_m=1, precision="no", patch=64, batch=1, lr=5e-2)
OWN = dict( # of each method: a few updates, a checkpoint at each
    dp2o=dict(m=2, n=1, steps=3, rank=4),
    asasr=dict(steps=3, rank=4, adversary_rank=4, outputs="bicubic;base", drift=0., start_steps=2, imitation_steps=2),
    dro=dict(steps=3, rank=4, capacity=2, refresh=2, cells=2))
STEPS_BEFORE = dict(base=0, dp2o=0, asasr=4, dro=0) # of the loop, in stages before the run's own


@pytest.fixture(scope="module")
def top(tmp_path_factory): return tmp_path_factory.mktemp("runs")


@pytest.fixture
def command(deadly):
    "command(config, die): the run of a config by `srnb train`; it is interrupted at update number `die`, and resumed"
    count, calls, die = deadly
    count(srnb.training, "ema_decay") # called once an update

    def run(config:Path, at:int|None=None):
        calls["ema_decay"] = 0
        if at is None: die.clear()
        else: die["ema_decay"] = at
        assert main(["train", str(config)]) == (0 if at is None else 130)
    return run


def config_of(folder, name, **said)->tuple[Path, Path]: # its file, and the run's folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder/f"{name}.json").write_text(json.dumps(dict(said, out=str(folder/name))))
    return folder/f"{name}.json", folder/name


def base_of(top, kind, command)->dict: # folders of a pipeline and of its branch, which is trained at the first call
    folders = {kind: top/kind/"pipeline", f"{kind}-control": top/kind/"base"/"control"}
    if not folders[f"{kind}-control"].exists():
        write_tiny(kind, folders[kind])
        config, _ = config_of(top/kind, "base", preset="base", init=str(folders[kind]), **BASE)
        command(config)
    return folders


@pytest.mark.parametrize("kind", KINDS)
def test_base(top, kind, command):
    "Killed and resumed: the same branch"
    folders = base_of(top, kind, command)
    config, out = config_of(top/kind, "cut", preset="base", init=str(folders[kind]), **BASE)
    command(config, 4)
    assert latest_checkpoint(out).name == "checkpoint-00000003"
    command(config)
    a, b = (load_file(o/"diffusion_pytorch_model.safetensors") for o in (folders[f"{kind}-control"], out/"control"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind, method", [
    pytest.param(k, m, marks=[] if (k, m) in ALIGNED_RUNS else pytest.mark.repeat)
    for k in ("sd", "sdxl", "flux") for m in METHODS])
def test_aligned(top, root, kind, method, command, forked):
    "Killed and resumed: the same adapter, which gives diffusers the same picture as here"
    folders = base_of(top, kind, command)
    train = "control" if method == "dro" else "base"
    options, folder = dict(control=str(folders[f"{kind}-control"]), train=train), top/kind/method
    if kind == "sd": # by the notebook; the command makes the others
        folder.mkdir()
        said = ALIGNED | OWN[method] | dict(steps=27) # its loop saves at step 20 or 25
        said |= dict(out=str(folder/"cut"), backbone=str(folders[kind]), options=options)
        page = (forks.notebook, root/"nbs"/f"train_{method}.ipynb", folder/"out.ipynb", said)
        killed = forked(forks.cut, "srnb.training.ema_decay", STEPS_BEFORE[method]+26, 0., *page, cwd=root)
        assert killed.wait() == -9, killed.err[-3000:]
        done = forked(*page, cwd=root)
        assert done.wait() == 0 and "resumed at step" in done.out, done.err[-3000:]
        said = json.loads((folder/"cut"/"config.json").read_text())["params"]
        whole = config_of(folder, "whole", **dict(said, config=said["config"] | dict(out=str(folder/"whole"))))
    else:
        own = dict(OWN[method])
        stages = {"start_loop.steps": own.pop("start_steps"), "imitation.steps": own.pop("imitation_steps")} \
            if method == "asasr" else {}
        said = ALIGNED | own | stages | dict(preset=method, backbone=str(folders[kind]), save_every=1, warmup=1)
        if method == "asasr": said["outputs"] = said["outputs"].split(";")
        said |= {f"options.{k}": v for k, v in options.items()}
        config, _ = config_of(folder, "cut", **said)
        command(config, STEPS_BEFORE[method]+2)
        command(config)
        whole = config_of(folder, "whole", **said)
    command(whole[0])
    assert read_config(whole[0]).method == read_config(folder/"cut"/"config.json").method
    same_result(whole[1], folder/"cut")
    policy = load_backbone(folders[kind], BackboneOptions(**options), prompts=["a tree"])
    load_adapter(policy, folder/"cut"/"adapter")
    lq = quantize(torch.rand(1, 3, 16, 16, generator=generator(0)))
    before, theirs = in_diffusers(folders, kind, policy, lq, folder/"cut"/"adapter")
    moved = (theirs-before).abs().max()
    assert moved > 1e-5*theirs.abs().max() # tiny random U-Nets hardly move; rounding is another factor of 10 below
    check_close(latents_of(policy, lq), theirs, atol=.1*moved.item())

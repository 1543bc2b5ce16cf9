"Two processes (gloo, CPU) do what one does: the same bank, the same weights, the same log, the same metrics"
import functools
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import same_result
from multi_worker import work
from safetensors.torch import load_file

import srnb.train
from srnb.align import DP2O, NFT, Adversary, Fresh, Given, Hinge, Method, Own, Rated, Riesz, Run, Start, Top
from srnb.backbones import BackboneOptions, load_backbone, write_tiny, write_tiny_control
from srnb.config import record
from srnb.curation import finished_groups, read_group
from srnb.degrade import RESSHIFT_TEST
from srnb.nets import OneStepConfig
from srnb.onestep import BaseRun, CTMSRRun, Match
from srnb.pairs import Logistic
from srnb.runs import Base, Data, Judging
from srnb.spectral import SobolevEnergy
from srnb.training import Loop

ROOT = Path(__file__).resolve().parent.parent
slow = pytest.mark.slow # the launcher itself, and a transformer, whose pieces are slow to exchange
LOOP = Loop(steps=3, parts=2, log_every=2, save_every=2, keep_every=1, lr=1e-3, warmup=1)
SHARED = dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
              FSDP_TRANSFORMER_CLS_TO_WRAP="FluxTransformerBlock,FluxSingleTransformerBlock",
              FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT")


def free_port()->str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def team(
    forked, # a fixture of conftest.py
    *what,  # for each of its processes
    **env,
)->list: # of two processes that have ended
    "Two warm processes with the environment that torchrun gives"
    env |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                ACCELERATE_USE_CPU="true")
    both = [forked(*what, RANK=str(k), LOCAL_RANK=str(k), **env) for k in (0, 1)]
    while all(o.poll() is None for o in both): both[0].wait(.1)
    if any(o.poll() for o in both): # the other one would wait for it
        for o in both: o.kill()
    for o in both: o.wait()
    return both


def said(run, out)->dict: return dict(run=type(run).__name__, config=record(run) | dict(out=str(out)))


@pytest.fixture(scope="module")
def dp2o(tiny):
    return Run("", replace(DP2O, winners=Top(1)), Data(size=64, places=1, take=2),
               Base(str(tiny), precision="no", sample_steps=2),
               Judging("offline_nr", m=4, judges=("psnr_y",), eval_m=2), LOOP, rank=4, batch=1, patch=32)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dp2o, forked_for_all):
    "name -> folders of the same run by one process and by two"
    top = tmp_path_factory.mktemp("multi")
    def flux(): # parameters without a gradient
        folder = write_tiny("flux", top/"flux")
        control = write_tiny_control(load_backbone(folder), top/"control")
        options = BackboneOptions(control=str(control), train="whole", checkpointing=True)
        base = Base(str(folder), precision="no", sample_steps=2, options=options)
        return replace(dp2o, base=base, data=replace(dp2o.data, take=1), judging=replace(dp2o.judging, eval_m=1),
                       loop=replace(LOOP, steps=2, log_every=1), patch=64, rank=Run.rank)
    def adversarial(losers):
        method = Method(SobolevEnergy(1.5), losers=losers, link=Logistic(1e4), start=Start(LOOP))
        return replace(dp2o, method=method, judging=Judging(None, judges=("psnr_y",), eval_m=2), batch=2)
    def online(): return replace(dp2o, method=Method(losers=Own(2, 3, 2, 2), link=Hinge(.001)), batch=2)
    def ctmsr(): # processes with different numbers of forwards
        loop = replace(LOOP, ema=.9)
        return CTMSRRun("", degradation=RESSHIFT_TEST, versions=1, max_side=160, patch=48, window=32, batch=1, size=96,
                        net=OneStepConfig((16, 16), (1, 1), tail=8), eval_m=1, judges=("psnr_y",), take=1, first=4,
                        last=4, precision="no", loop=loop,
                        match=Match(refresh=2, match_loop=replace(loop, keep_every=0)))
    made = dict(
        dp2o=lambda: dp2o,
        more=lambda: replace(dp2o, loop=replace(LOOP, parts=4, ema=.5)), # two micro-batches a process
        guarded=lambda: replace(dp2o, method=replace(dp2o.method, safeguard=True)),
        rounds=lambda: replace(dp2o, rounds=2, base=replace(dp2o.base, adapter=str(one("dp2o")))),
        rows=lambda: replace(dp2o, rows=1),
        guarded_rows=lambda: replace(dp2o, method=replace(dp2o.method, safeguard=True), rows=1),
        given=lambda: adversarial(Given(("base",))),
        riesz=lambda: adversarial(Riesz(.003)),
        adversary=lambda: adversarial(Adversary(("base",), 4, imitation=LOOP)),
        online=online,
        fresh=lambda: replace(dp2o, method=Method(winners=Rated(), losers=Fresh(2, 1, 2, ramp=.1), link=NFT())),
        ctmsr=ctmsr,
        flux=flux,
        branch=lambda: BaseRun("", init=str(write_tiny("flux", top/"flux")), versions=1, max_side=160, batch=1,
                               precision="no", loop=replace(LOOP, steps=2, log_every=1, ema=.5)))
    made = {name: functools.cache(make) for name, make in made.items()}

    @functools.cache
    def one(name): return srnb.train.train(replace(made[name](), out=str(top/"one"/name)))

    @functools.cache
    def both(name):
        fsdp, out = name.startswith("fsdp-"), top/"two"/name
        alone = name.removeprefix("fsdp-")
        single, config = one(alone), said(made[alone](), out)
        done = team(forked_for_all, work, config, 2, fsdp, **SHARED if fsdp else {})
        assert not any(o.wait() for o in done), "".join(o.err for o in done)
        if fsdp: assert any("resumed at step 2" in o.out for o in done)
        return single, out
    return both


ONE = ["dp2o", "adversary", *(pytest.param(o, marks=slow)
                              for o in ("online", "guarded_rows", "rounds", "fresh")),
       *(pytest.param(o, marks=[slow, pytest.mark.repeat]) # as guarded_rows; as the adversary
         for o in ("guarded", "given", "riesz"))]


@pytest.mark.parametrize("name", ONE)
def test_two_are_one(runs, name):
    one, two = runs(name)
    same_result(one, two)


@pytest.mark.parametrize("name", ["more", pytest.param("rows", marks=slow)])
def test_sums(runs, name):
    "With two micro-batches in each process, or with one in pieces, only the order of the sum differs"
    one, two = (load_file(o/"adapter"/"adapter_model.safetensors") for o in runs(name))
    assert one.keys() == two.keys() and all((one[k]-two[k]).norm() <= 1e-2*one[k].norm() for k in one)
    assert any(v.abs().sum() > 0 for k, v in one.items() if "lora_B" in k)


def test_one_step(runs):
    "A run whose processes do different numbers of forwards comes to an end, and learns what one process learns"
    one, two = (load_file(next((o/"policy").glob("*.safetensors"))) for o in runs("ctmsr"))
    assert one.keys() == two.keys()
    for k in one:
        a, b = one[k].float(), two[k].float()
        assert (a-b).norm() <= 1e-2*a.norm().clip(min=1e-3), k


@slow
@pytest.mark.parametrize("name", ["flux", "fsdp-flux"])
def test_close(runs, name):
    """A transformer's matrix products may round differently from process to process: what two learn is what one learns,
    to that; FSDP writes it whole"""
    one, two = (load_file(o/"adapter"/"adapter_model.safetensors") for o in runs(name))
    start = load_file(runs("flux")[0].parent.parent/"control"/"diffusion_pytorch_model.safetensors")
    assert one.keys() == two.keys() and {k.split("controlnet.")[1] for k in one} == set(start)
    moved = sum((one[k]-start[k.split("controlnet.")[1]]).square().sum() for k in one).sqrt()
    apart = sum((one[k]-two[k]).square().sum() for k in one).sqrt()
    # where a gradient is nearly 0, AdamW goes one way or the other
    assert moved > .1 and apart < .2*moved, (moved, apart)
    a, b = (pd.read_parquet(o/"log.parquet") for o in runs(name))
    assert len(a) == 2 and ((a-b).abs() < .03*a.abs().clip(lower=1)).all(axis=None)


@slow
@pytest.mark.parametrize("name", ["branch", "fsdp-branch"])
def test_branch(runs, name):
    "A control branch that two processes train to read, whole or in pieces, is that of one, to rounding"
    one, two = (load_file(o/"control"/"diffusion_pytorch_model.safetensors") for o in runs(name))
    start = load_backbone(runs("branch")[0].parent.parent/"flux").net.controlnet.state_dict()
    assert one.keys() == two.keys() == start.keys()
    moved = sum((one[k]-start[k]).square().sum() for k in one).sqrt()
    apart = sum((one[k]-two[k]).square().sum() for k in one).sqrt()
    assert moved > .01 and apart < .2*moved, (moved, apart)
    a, b = (pd.read_parquet(o/"log.parquet") for o in runs(name))
    assert len(a) == 2 and "influence" in a and ((a-b).abs() < .03*a.abs().clip(lower=1)).all(axis=None)


@pytest.mark.parametrize("file", ["ddp", "fsdp"])
def test_examples(root, file):
    "Accelerate reads the example configs"
    config = load_config_from_file(str(root/f"nbs/accelerate/{file}.yaml"))
    assert config.num_processes == 8 and config.distributed_type == dict(ddp="MULTI_GPU", fsdp="FSDP")[file]


@pytest.mark.parametrize("name", ["dp2o", pytest.param("flux", marks=slow)])
def test_bank_of_two(runs, name):
    for bank in ("bank", "before"):
        one, two = (o/bank for o in runs(name))
        ids = finished_groups(one)
        assert sorted(ids) == sorted(finished_groups(two)) and len(ids) == (2 if name == "dp2o" else 1)
        if name == "dp2o":
            files = [{f.name: f.read_bytes() for f in (o/"groups").iterdir()} for o in (one, two)]
            assert files[0] == files[1]
        for i in ids: assert (read_group(one, i).sr-read_group(two, i).sr).abs().max() < 1.5/255


def test_uneven_parts(tmp_path, dp2o, forked):
    "Three micro-batches cannot be shared by two processes, and that is said before a bank is drawn"
    (tmp_path/"c.json").write_text(json.dumps(said(replace(dp2o, loop=replace(LOOP, parts=3)), tmp_path/"out")))
    both = team(forked, "-m", "srnb.train", tmp_path/"c.json")
    assert any("cannot share the 3 micro-batches" in o.err for o in both) and not (tmp_path/"out").exists()


@slow
def test_torchrun(runs, tmp_path, dp2o):
    "The launcher itself starts two processes, cold"
    out = tmp_path/"out"
    (tmp_path/"c.json").write_text(json.dumps(said(dp2o, out)))
    cmd = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port(), "-m", "srnb.train"]
    env = os.environ | dict(ACCELERATE_USE_CPU="true")
    done = subprocess.run([sys.executable, *cmd, str(tmp_path/"c.json")], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    same_result(runs("dp2o")[0], out)


def machines(tmp_path, places, config)->list: # of two launchers that have ended
    "Accelerate's launcher, once for each of two machines, which work in folders of their own"
    both = []
    for rank, place in enumerate(places):
        place.mkdir()
        ddp = str(ROOT/"nbs/accelerate/ddp.yaml")
        cmd = ["-m", "accelerate.commands.launch", "--config_file", ddp, "--num_machines", "2", "--num_processes", "2",
               "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", config["port"],
               "-m", "srnb.train", config["file"]]
        both.append(subprocess.Popen([sys.executable, *cmd], cwd=place, stdout=subprocess.PIPE, text=True,
                                     stderr=subprocess.STDOUT, env=os.environ | dict(ACCELERATE_USE_CPU="true")))
    return [(o.communicate()[0], o.returncode) for o in both]


@slow
def test_two_machines(runs, tmp_path, dp2o):
    "notes_nodes.ipynb: a launcher on each machine, one folder; with a folder each, both say what is wrong"
    config = dict(file=str(tmp_path/"c.json"), port=free_port())
    (tmp_path/"c.json").write_text(json.dumps(said(dp2o, tmp_path/"out")))
    done = machines(tmp_path, (tmp_path/"a", tmp_path/"b"), config)
    assert [code for _, code in done] == [0, 0], done
    same_result(runs("dp2o")[0], tmp_path/"out")
    (tmp_path/"c.json").write_text(json.dumps(said(dp2o, "out"))) # each sees its own
    done = machines(tmp_path, (tmp_path/"c", tmp_path/"d"), config | dict(port=free_port()))
    assert all(code and "do not see the same out: give a folder that all machines share" in text for text, code in done)

"Two processes (gloo, CPU) do what one does: the same bank, the same weights, the same log, the same metrics"
import functools
import json
import os
import socket
import subprocess
import sys

import pandas as pd
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import same_result
from multi_worker import work
from safetensors.torch import load_file

from srnb.align import RUNS
from srnb.backbones import load_backbone, write_tiny
from srnb.curation import finished_groups, read_group
from srnb.training import from_config

slow = pytest.mark.slow # the launcher itself, and a transformer, whose pieces are slow to exchange
LOOP = dict(steps=3, parts=2, log_every=2, save_every=2, keep_every=1, lr=1e-3, warmup=1)
WHOLE = dict(LOOP, steps=2, log_every=1)
COMMON = dict(size=64, patch=32, places=1, take=2, m=4, n=1, steps=2, eval_m=2, rank=4, precision="no",
              judges=["psnr_y"], reward="offline_fr", loop=LOOP)
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


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny, forked_for_all):
    "name -> folders of the same run by one process and by two"
    top = tmp_path_factory.mktemp("multi")
    dp2o = dict(COMMON, run="dp2o", backbone=str(tiny), groups=1)
    asasr = {k: v for k, v in COMMON.items() if k not in ("m", "n", "reward")}
    asasr |= dict(run="asasr", backbone=str(tiny), outputs=["base"], loser="riesz", adversary_rank=4, batch=2,
                  sft=LOOP, imitation=LOOP)
    online = dict(run="align", backbone=str(tiny), losers="policy", batch=2, every=2, capacity=3, refresh=2, cells=2)
    ctmsr = dict(run="ctmsr", degradation="resshift_test", versions=1, max_side=160, channels=[16, 16], blocks=[1, 1],
                 tail=8, patch=48, window=32, batch=1, size=96, eval_m=1, judges=["psnr_y"], refresh=2, take=1, first=4,
                 last=4, precision="no", loop=dict(LOOP, ema=.9), match_loop=dict(LOOP, ema=.9))
    flux = dict(backbone=str(top/"flux"), options=dict(train="whole", checkpointing=True), patch=64, eval_m=1, take=1,
                loop=WHOLE)
    configs = dict(
        dp2o=dp2o,
        more=dp2o | dict(loop=dict(LOOP, parts=4, ema=.5)), # two micro-batches a process
        ctmsr=ctmsr, # processes with different numbers of forwards
        guarded=dp2o | dict(safeguard=True),
        asasr=asasr,
        online=COMMON | online,
        flux=dp2o | flux) # parameters without a gradient

    @functools.cache
    def one(name):
        if name == "flux": write_tiny("flux", top/"flux")
        function, cfg = from_config(configs[name] | dict(out_dir=str(top/"one"/name)), RUNS)
        return function(cfg)

    @functools.cache
    def both(name):
        single, fsdp, out = one("flux" if name == "fsdp" else name), name == "fsdp", top/"two"/name
        config = configs["flux" if fsdp else name] | dict(out_dir=str(out))
        done = team(forked_for_all, work, config, 2, fsdp, **SHARED if fsdp else {})
        assert not any(o.wait() for o in done), "".join(o.err for o in done)
        if fsdp: assert any("resumed at step 2" in o.out for o in done)
        return single, out
    return both


@pytest.mark.parametrize("name", ["dp2o", "guarded", "asasr", "online"])
def test_two_are_one(runs, name):
    one, two = runs(name)
    same_result(one, two)


def test_sums(runs):
    "With two micro-batches in each process only the order of the sum differs"
    one, two = (load_file(o/"adapter"/"adapter_model.safetensors") for o in runs("more"))
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
@pytest.mark.parametrize("name", ["flux", "fsdp"])
def test_close(runs, name):
    """A transformer's matrix products may round differently from process to process: what two learn is what one learns,
    to that; FSDP writes it whole"""
    one, two = (load_file(o/"adapter"/"adapter_model.safetensors") for o in runs(name))
    start = load_backbone(runs("flux")[0].parent.parent/"flux").net.controlnet.state_dict()
    assert one.keys() == two.keys() and {k.split("controlnet.")[1] for k in one} == set(start)
    moved = sum((one[k]-start[k.split("controlnet.")[1]]).square().sum() for k in one).sqrt()
    apart = sum((one[k]-two[k]).square().sum() for k in one).sqrt()
    # where a gradient is nearly 0, AdamW goes one way or the other
    assert moved > .1 and apart < .2*moved, (moved, apart)
    a, b = (pd.read_parquet(o/"log.parquet") for o in runs(name))
    assert len(a) == 2 and ((a-b).abs() < .03*a.abs().clip(lower=1)).all(axis=None)


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


def test_uneven_parts(tmp_path, tiny, forked):
    "Three micro-batches cannot be shared by two processes, and that is said before a bank is drawn"
    config = dict(COMMON, run="dp2o", backbone=str(tiny), loop=dict(LOOP, parts=3), out_dir=str(tmp_path/"out"))
    (tmp_path/"c.json").write_text(json.dumps(config))
    both = team(forked, "-m", "srnb.training", tmp_path/"c.json")
    assert any("cannot share the 3 micro-batches" in o.err for o in both) and not (tmp_path/"out").exists()


@slow
def test_torchrun(runs, tmp_path, tiny):
    "The launcher itself starts two processes, cold"
    out = tmp_path/"out"
    (tmp_path/"c.json").write_text(json.dumps(dict(COMMON, run="dp2o", backbone=str(tiny), groups=1, out_dir=str(out))))
    cmd = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port(), "-m", "srnb.training"]
    env = os.environ | dict(ACCELERATE_USE_CPU="true")
    done = subprocess.run([sys.executable, *cmd, str(tmp_path/"c.json")], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    same_result(runs("dp2o")[0], out)

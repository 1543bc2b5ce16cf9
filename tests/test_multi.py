"Two processes (gloo, CPU) do what one does: the same bank, the same weights, the same log, the same metrics"
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import same_result
from safetensors.torch import load_file

from srnb.align import RUNS
from srnb.backbones import load_backbone, write_tiny
from srnb.curation import finished_groups, read_group
from srnb.training import from_config

pytestmark = pytest.mark.timeout(1800) # the runs are made before the first test
LOOP = dict(steps=3, parts=2, log_every=2, save_every=2, keep_every=1, lr=1e-3, warmup=1)
WHOLE = dict(LOOP, steps=2, log_every=1) # shorter: pieces are slow to exchange on a CPU
COMMON = dict(size=64, patch=32, places=1, take=2, m=4, n=1, steps=2, eval_m=2, rank=4, precision="no", judges=["psnr_y"], reward="offline_fr", loop=LOOP)


def torchrun(n:int, *args, wait:float=900, **env)->subprocess.CompletedProcess:
    "Start a script in n processes, as `accelerate launch` does"
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    cmd = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n), "--master_port", str(port), *map(str, args)]
    return subprocess.run(cmd, capture_output=True, text=True, timeout=wait, env={**os.environ, "ACCELERATE_USE_CPU": "true", **env})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny)->dict[str, tuple[Path, Path]]:
    "The same runs by one process and by two: name -> folders"
    top = tmp_path_factory.mktemp("multi")
    flux = str(write_tiny("flux", top/"flux"))
    configs = dict(
        dp2o=dict(COMMON, run="dp2o", backbone=str(tiny), groups=1),
        more=dict(COMMON, run="dp2o", backbone=str(tiny), groups=1, loop=dict(LOOP, parts=4, ema=.5)), # two micro-batches a process
        ctmsr=dict(run="ctmsr", degradation="resshift_test", versions=1, max_side=160, channels=[16, 16], blocks=[1, 1], tail=8, patch=48, window=32, batch=1, size=96, eval_m=1,
                   judges=["psnr_y"], refresh=2, take=1, first=4, last=4, precision="no", loop=dict(LOOP, ema=.9), match_loop=dict(LOOP, ema=.9)), # processes with different numbers of forwards
        guarded=dict(COMMON, run="dp2o", backbone=str(tiny), groups=1, safeguard=True),
        asasr=dict({k: v for k, v in COMMON.items() if k not in ("m", "n", "reward")}, run="asasr", backbone=str(tiny), outputs=["base"], loser="riesz", adversary_rank=4, batch=2, sft=LOOP, imitation=LOOP),
        online=dict(COMMON, run="align", backbone=str(tiny), losers="policy", batch=2, every=2, capacity=3, refresh=2, cells=2),
        flux=dict(COMMON, run="dp2o", backbone=flux, options=dict(train="whole", checkpointing=True), groups=1, patch=64, eval_m=1, take=1, loop=WHOLE)) # parameters without a gradient
    for name, config in configs.items():
        function, cfg = from_config(dict(config, out_dir=str(top/"one"/name)), RUNS); function(cfg)
    (top/"configs.json").write_text(json.dumps([dict(c, out_dir=str(top/"two"/n)) for n, c in configs.items()]))
    done = torchrun(2, Path(__file__).with_name("multi_worker.py"), top/"configs.json", 2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (top/"fsdp.json").write_text(json.dumps([dict(configs["flux"], out_dir=str(top/"two"/"fsdp"))]))
    done = torchrun(2, Path(__file__).with_name("multi_worker.py"), top/"fsdp.json", 2, "fsdp", ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
                    FSDP_TRANSFORMER_CLS_TO_WRAP="FluxTransformerBlock,FluxSingleTransformerBlock", FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT")
    assert done.returncode == 0 and "resumed at step 2" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
    return {n: (top/"one"/n, top/"two"/n) for n in configs} | dict(fsdp=(top/"one"/"flux", top/"two"/"fsdp"))


@pytest.mark.parametrize("name", ["dp2o", "guarded", "asasr", "online"])
def test_two_are_one(runs, name):
    one, two = runs[name]
    same_result(one, two)


def test_sums(runs):
    "With two micro-batches in each process only the order of the sum differs"
    one, two = (load_file(o/"adapter"/"adapter_model.safetensors") for o in runs["more"])
    assert one.keys() == two.keys() and all((one[k]-two[k]).norm() <= 1e-2*one[k].norm() for k in one) and any(v.abs().sum() > 0 for k, v in one.items() if "lora_B" in k)


def test_one_step(runs):
    "A run whose processes do different numbers of forwards comes to an end, and learns what one process learns"
    one, two = (load_file(next((o/"policy").glob("*.safetensors"))) for o in runs["ctmsr"])
    assert one.keys() == two.keys() and all((one[k].float()-two[k].float()).norm() <= 1e-2*one[k].float().norm().clip(min=1e-3) for k in one)


@pytest.mark.parametrize("name", ["flux", "fsdp"])
def test_close(runs, name):
    "A transformer's matrix products may round differently from process to process: what two learn is what one learns, to that; FSDP writes it whole"
    one, two = (load_file(o/"adapter"/"adapter_model.safetensors") for o in runs[name])
    start = load_backbone(runs["flux"][0].parent.parent/"flux").net.controlnet.state_dict()
    assert one.keys() == two.keys() and {k.split("controlnet.")[1] for k in one} == set(start)
    moved = sum((one[k]-start[k.split("controlnet.")[1]]).square().sum() for k in one).sqrt()
    apart = sum((one[k]-two[k]).square().sum() for k in one).sqrt()
    assert moved > .1 and apart < .2*moved, (moved, apart) # where a gradient is nearly 0, AdamW goes one way or the other
    a, b = (pd.read_parquet(o/"log.parquet") for o in runs[name])
    assert len(a) == 2 and ((a-b).abs() < .03*a.abs().clip(lower=1)).all(axis=None)


@pytest.mark.parametrize("file", ["ddp", "fsdp"])
def test_examples(root, file):
    "Accelerate reads the example configs"
    config = load_config_from_file(str(root/f"nbs/accelerate/{file}.yaml"))
    assert config.num_processes == 8 and config.distributed_type == dict(ddp="MULTI_GPU", fsdp="FSDP")[file]


@pytest.mark.parametrize("name", ["dp2o", "flux"])
def test_bank_of_two(runs, name):
    for bank in ("bank", "before"):
        one, two = (o/bank for o in runs[name])
        ids = finished_groups(one)
        assert sorted(ids) == sorted(finished_groups(two)) and len(ids) == (2 if name == "dp2o" else 1)
        if name == "dp2o": assert {f.name: f.read_bytes() for f in (one/"groups").iterdir()} == {f.name: f.read_bytes() for f in (two/"groups").iterdir()}
        for i in ids: assert (read_group(one, i).sr-read_group(two, i).sr).abs().max() < 1.5/255


def test_uneven_parts(tmp_path, tiny):
    "Three micro-batches cannot be shared by two processes, and that is said before a bank is drawn"
    (tmp_path/"c.json").write_text(json.dumps(dict(COMMON, run="dp2o", backbone=str(tiny), loop=dict(LOOP, parts=3), out_dir=str(tmp_path/"out"))))
    done = torchrun(2, "-m", "srnb.training", tmp_path/"c.json")
    assert done.returncode and "cannot share the 3 micro-batches" in done.stderr and not (tmp_path/"out").exists()

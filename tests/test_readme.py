"""The commands of README.md, extracted and run as they stand. What they name for the reader (a photograph, a folder, a
checkpoint) is put there first; notebooks see IN_TEST, which makes them small; of make, only the plan is asked for,
since `make test` is what runs this."""
import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent/"README.md"


def commands(text:str)->list[str]:
    "Lines of the bash blocks, continued lines joined, comments left out"
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.M|re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"(^|\s)#.*", "", o).split() for o in lines]
    return [" ".join(o) for o in lines if o]


FOUND = commands(README.read_text())


def photographs(folder:Path, others:Path)->None:
    "Copies, three of which a split by content holds out, and two that are in no other folder"
    from srnb.data import embedded_photos, share_of
    by_share = sorted(embedded_photos(), key=share_of)
    for to, photos in ((folder, by_share[:3]+by_share[-2:]), (others, by_share[3:5])):
        to.mkdir(parents=True)
        for p in photos: shutil.copy(p.path, to)


@pytest.fixture(scope="module")
def places(tmp_path_factory)->dict[str, str]:
    "What README calls path/to/..., and a pipeline in place of the one that would be downloaded"
    import torch
    from spandrel.architectures.Compact import Compact

    from srnb.backbones import load_backbone, write_tiny, write_tiny_control
    top = tmp_path_factory.mktemp("readme")
    photographs(top/"photographs", top/"others")
    torch.manual_seed(0)
    torch.save(Compact(num_feat=8, num_conv=2, upscale=4).state_dict(), top/"checkpoint.pth")
    write_tiny_control(load_backbone(write_tiny("sd", top/"sd2")), top/"controlnet")
    return {"path/to/folder": str(top/"photographs"), "path/to/others": str(top/"others"),
            "path/to/checkpoint.pth": str(top/"checkpoint.pth"),
            "controlnet": str(top/"controlnet"), "sd2": str(top/"sd2")}


def here(command:str)->str:
    "Programs of the environment that runs this"
    return command.replace(".venv/bin/", f"{Path(sys.executable).parent}/")


def run(command:str, cwd:Path, env:dict)->None:
    done = subprocess.run(["bash", "-c", here(command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def test_every_kind_is_run_here():
    "A command that README gains must be run below"
    known = "make", "papermill", "srnb upscale", "srnb bench", "srnb train", "echo", "accelerate launch"
    kinds = [re.search("|".join(rf"\b{o}\b" for o in known), o) for o in FOUND]
    assert FOUND and all(kinds), [o for o, k in zip(FOUND, kinds, strict=True) if not k]
    assert {*known} == {k[0] for k in kinds}


@pytest.mark.parametrize("command", [o for o in FOUND if o.startswith("make ")])
def test_make(command, root, clean_env):
    run(command.replace("make ", "make --dry-run "), root, clean_env)


PAPERMILL = [o for o in FOUND if "papermill" in o]


@pytest.mark.parametrize("command", PAPERMILL)
def test_parameters(command, root):
    "Papermill takes any name: those of README are in the notebook's cell of parameters"
    words = shlex.split(command)
    cells = json.loads((root/words[1]).read_text())["cells"]
    source = "\n".join("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
    names = {t.id for o in ast.parse(source).body if isinstance(o, ast.Assign) for t in o.targets}
    options = {name for flag, value in zip(words, words[1:], strict=False) for name in [value.partition(":")[0]]
               if flag in ("-p", "-y")}
    assert options and options <= names


@pytest.mark.repeat # nbdev's way of running them is in test_notebooks.py
@pytest.mark.parametrize("command", PAPERMILL)
def test_papermill(command, root, tmp_path, places, clean_env):
    from srnb.data import embedded_photos
    env, small = dict(clean_env, IN_TEST="1"), ""
    if "-p backbone sd2" in command:
        small = f" -y 'backbones: {{sd2: {places['sd2']}}}' -p size 64 -p patch 64 -p sample_steps 2"
        shutil.copytree(places["controlnet"], tmp_path/"sd2-base"/"control") # what the command before it trains
    if "compare_upscalers" in command: # which in a test leaves the checkpoint out
        small, env = f" -p size 64 -p take 1 -p out {tmp_path}/compare", clean_env
        unseen = tmp_path/"unseen" # by the networks that ship
        unseen.mkdir()
        for p in embedded_photos("held_out")[:2]: shutil.copy(p.path, unseen)
        command = command.replace("path/to/folder", str(unseen))
    for name in ("path/to/folder", "path/to/others", "path/to/checkpoint.pth"):
        command = command.replace(name, places[name])
    run(command.replace("nbs/_runs/", f"{tmp_path}/") + small, root, env)
    assert list(tmp_path.glob("*.ipynb"))


@pytest.mark.parametrize("command", [o for o in FOUND if "srnb bench" in o])
def test_bench(command, tmp_path, clean_env):
    import torch

    from srnb.baselines import bicubic_x4
    from srnb.core import bicubic, generator, write_image
    gt = bicubic(torch.rand(1, 3, 64, 64, generator=generator(0)), (512, 512))
    lq = bicubic(gt, (128, 128))
    for name, image in (("sets/realsr/gt", gt), ("sets/realsr/lq", lq), ("outputs", bicubic_x4(lq)/2)):
        write_image(tmp_path/name/"a.png", image[0])
    run(command.replace("path/to/testsets", "sets"), tmp_path, clean_env)
    if "-o bench" in command: assert "| mine |" in (tmp_path/"bench/table.md").read_text()


@pytest.mark.parametrize("command", [o for o in FOUND if "srnb upscale" in o])
def test_upscale(command, tmp_path, clean_env):
    from PIL import Image
    (tmp_path/"holiday").mkdir()
    for name, size in {"photo.jpg": (20, 16), "holiday/a.jpg": (24, 20), "holiday/b.png": (24, 20)}.items():
        Image.new("RGB", size, (90, 120, 60)).save(tmp_path/name)
    run(command, tmp_path, clean_env)
    out = command.split("-o ")[1].split("/")[0]
    made = {p.stem: Image.open(p).size for p in (tmp_path/out).rglob("*.png")}
    assert len(made) == (3 if "holiday/" in command else 1)
    assert made["photo"] == (80, 64) and set(made.values()) <= {(80, 64), (96, 80)}


LESS = dict(size=64, patch=32, m=4, n=1, steps=1, parts=1, sample_steps=2, eval_m=2, take=2, places=1, precision="no")


@pytest.mark.slow
@pytest.mark.parametrize("command", [o for o in FOUND if "srnb train" in o and "--help" not in o])
def test_train(command, tmp_path, places, tiny, forked):
    "The run of the command line, made small"
    from srnb.config import fill
    from srnb.onestep import BaseRun
    from srnb.train import run_of, train
    for name in ("path/to/folder", "path/to/checkpoint.pth"): command = command.replace(name, places[name])
    words = shlex.split(command)[2:]
    run, out = run_of(words), str(tmp_path/"run")
    if isinstance(run, BaseRun) and run.restorer:
        small = dict(photos=(), max_side=160, batch=2, precision="no", loop=replace(run.loop, steps=2, warmup=1))
        out = train(replace(run, out=out, **small))
        assert (out/"policy"/"policy.json").exists()
    elif isinstance(run, BaseRun): # of a backbone
        loop = replace(run.loop, steps=2, warmup=1, parts=1)
        small = dict(photos=(), patch=64, max_side=160, batch=1, precision="no", loop=loop) # copies are held out here
        out = train(replace(run, init=places["sd2"], out=out, **small))
        assert (out/"control"/"config.json").exists()
    else:
        out = train(fill(run, LESS | dict(out=out, backbone=str(tiny))))
        assert (out/"metrics.parquet").exists()
    done = forked("-c", "from srnb.command import main; raise SystemExit(main())", "train", out/"config.json",
                  "--out", out) # the same run by the command: it is done
    assert done.wait() == 0 and "is done" in done.out, done.err


@pytest.mark.parametrize("command", [o for o in FOUND if "srnb train" in o and "--help" in o])
def test_help(command, forked):
    done = forked("-c", "from srnb.command import main; raise SystemExit(main())", *shlex.split(command)[1:])
    assert done.wait() == 0 and "--loop.steps" in done.out, done.err


@pytest.fixture
def launch(root, tmp_path, places, tiny, clean_env)->list[str]:
    "The words of the launch; its config is written as README writes it, then made small"
    echo, launch = ([o for o in FOUND if w in o] for w in ("echo", "accelerate launch"))
    assert len(echo) == len(launch) == 1
    run(echo[0], tmp_path, clean_env)
    config = json.loads((tmp_path/"config.json").read_text())
    less = dict(LESS, out=str(tmp_path/"run"), backbone=str(tiny), photos=[places["path/to/folder"]])
    (tmp_path/"config.json").write_text(json.dumps(config | less))
    return [str(root/o) if o.endswith(".yaml") else o for o in shlex.split(launch[0])]


def test_config(launch, tmp_path, forked):
    "What is launched, without the launcher"
    done = forked(*launch[launch.index("-m"):], cwd=tmp_path)
    assert done.wait() == 0 and (tmp_path/"run/metrics.parquet").exists(), done.err


@pytest.mark.slow
def test_launch(launch, tmp_path, clean_env):
    "On one CPU process instead of eight GPUs"
    at = launch.index("launch")+1
    launch[at:at] = ["--cpu", "--num_processes", "1"]
    run(shlex.join(launch), tmp_path, clean_env)
    assert (tmp_path/"run/metrics.parquet").exists()

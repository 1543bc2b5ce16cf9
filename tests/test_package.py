"The package as a user gets it: cheap to import, complete when installed, one version"
import configparser
import json
import shutil
import subprocess
import sys
import zipfile

import pytest

import srnb

HEAVY = ["pyiqa", "diffusers", "transformers", "matplotlib", "seaborn", "lpips", "IPython"]
METRICS = ["pyiqa", "lpips", "stlpips_pytorch", "pycvvdp", "cvvdp", "matplotlib", "seaborn"]
LIGHT = ["core", "spectral", "paths", "degrade", "data", "nets", "policies"] # rooms that live on torch and Pillow alone


def loaded(code, root, env): # modules in a fresh interpreter after `code`
    cmd = [sys.executable, "-c", f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"]
    out = subprocess.run(cmd, cwd=root, env=env, check=True, capture_output=True, text=True)
    return set(json.loads(out.stdout.splitlines()[-1]))


def modules(root): return sorted(p.stem for p in (root/"srnb").glob("*.py") if not p.stem.startswith("_"))


def test_import_is_cheap(root, clean_env):
    found = loaded("import srnb", root, clean_env)
    assert "srnb" in found
    assert not found & {*HEAVY, *METRICS, "accelerate", "peft"}


@pytest.mark.parametrize("line", [
    "--help", "upscale -h", "upscale a.png", "upscale a/x.png b/x.png -o out", "upscal a",
    "upscale a/x.png -o b/x.png/", "upscale a b -o out.png", "upscale a -o out --seed 1,1",
    "bench -h", "bench oseddif", "bench osediff a", "bench osediff a/x x=b --data a -o out --sede 1",
    "bench osediff n=a n=b --data a -o out", "bench osediff a --data nowhere -o out", "bench --check",
    "votes page -h", "votes page o a@1 --data a", "votes red"])
def test_what_is_wrong_with_a_line_is_said_without_torch(root, clean_env, tmp_path, line):
    code = f"""
import os, sys
os.chdir({str(tmp_path)!r})
for o in "ab":
    os.makedirs(o, exist_ok=True)
    open(o + "/x.png", "w").close()
from srnb.command import main
assert main({line.split()!r}) == {0 if "-h" in line else 2}"""
    found = loaded(code, root, clean_env)
    assert not found & {*HEAVY, *METRICS, "torch", "numpy", "pandas", "PIL"}


def test_rooms_import_what_they_need(root, clean_env):
    "No metric library anywhere; pandas, SciPy and PEFT only where a table or an adapter is made. Light rooms first"
    names, later = modules(root), {*HEAVY, *METRICS, "pandas", "scipy", "peft", "accelerate", "torchvision"}
    assert {*LIGHT} < {*names}
    light, rooms = ("\n".join(f"import srnb.{o}" for o in part) for part in (LIGHT, names))
    check = f"import sys\nearly = sorted({later} & {{*sys.modules}})\nassert not early, early"
    found = loaded(f"{light}\n{check}\n{rooms}", root, clean_env)
    assert {f"srnb.{o}" for o in names} <= found
    assert not found & set(METRICS)


def test_one_version(root):
    ini = configparser.ConfigParser()
    ini.read(root/"settings.ini")
    assert srnb.__version__ == ini["DEFAULT"]["version"]


def test_lock_is_plain(root):
    lines = (root/".ci/requirements.lock").read_text().splitlines()
    assert len(lines) > 50
    for o in lines:
        name, version = o.split("==")
        assert name and version and not name.startswith(("nvidia", "cuda", "triton"))


def test_lock_holds_the_constraints(root):
    lock = (root/".ci/requirements.lock").read_text().splitlines()
    pins = [o for o in (root/".ci/constraints.txt").read_text().splitlines() if o and not o.startswith("#")]
    assert pins
    assert set(pins) <= set(lock)


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory): # names in a wheel built from the tree as it is
    src, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for o in ("pyproject.toml", "README.md", "LICENSE"): shutil.copy(root/o, src)
    shutil.copytree(root/"srnb", src/"srnb", ignore=shutil.ignore_patterns("__pycache__"))
    for o in ("weights/probe.safetensors", "photos/probe.jpg"): # so that the rule is tested whatever ships today
        (src/"srnb"/o).parent.mkdir(exist_ok=True)
        (src/"srnb"/o).write_bytes(b"x")
    cmd = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*cmd, "-w", out, src], check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("srnb-*.whl")))


def test_wheel_is_complete(root, wheel):
    want = {str(p.relative_to(root)) for p in (root/"srnb").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    want |= {"srnb/weights/probe.safetensors", "srnb/photos/probe.jpg"}
    assert want <= set(wheel.namelist())
    assert not [o for o in wheel.namelist() if o.startswith(("nbs", "tests"))]


def test_wheel_names_its_licence(wheel):
    text = wheel.read(next(o for o in wheel.namelist() if o.endswith(".dist-info/METADATA"))).decode()
    assert "License-Expression: Apache-2.0" in text
    assert f"Version: {srnb.__version__}" in text
    assert any(o.endswith("licenses/LICENSE") for o in wheel.namelist())

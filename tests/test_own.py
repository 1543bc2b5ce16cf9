"What is the reader's own: photographs, ready pairs, preferences, a file with degradation, metric, reward and network"
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import same_result

from srnb.align import DP2O, Run, Top, align
from srnb.config import fill, leaves
from srnb.core import RunOccupied, generator, read_run, to_pil, write_image
from srnb.curation import finished_groups, read_group
from srnb.data import PatchPool, embedded_photos
from srnb.degrade import RESSHIFT_TEST
from srnb.onestep import BaseRun, CTMSRRun, Match, sft_loss, train_base, train_ctmsr
from srnb.runs import Base, Data, Judging, photo_sets, small_policy
from srnb.train import presets, read_config
from srnb.training import Loop

FEW = Loop(steps=2, lr=1e-3, warmup=1, save_every=2, log_every=1)


@pytest.fixture(scope="module")
def config(tiny):
    return Run("", replace(DP2O, winners=Top(1)), Data(size=64, places=1, take=2),
               Base(str(tiny), precision="no", sample_steps=2),
               Judging("offline_nr", m=2, judges=("psnr_y",), eval_m=2), FEW, rank=2, batch=2, patch=32)


# ---------------------------------------------------------------- photographs

def sets(photos, *held): return photo_sets(Data([photos], held), 8, None)


def test_own_photographs(tmp_path):
    "Folders instead of the embedded set; one that leaks is refused"
    g, folder, one = generator(1), tmp_path/"photos", tmp_path/"one"
    for o in (folder, one): o.mkdir()
    for i in range(8):
        blocks = torch.rand(3, 12, 12, generator=g).repeat_interleave(8, 1).repeat_interleave(8, 2)
        to_pil(blocks).save(folder/f"{i}.png")
    train, test = sets(folder)
    assert len(train)+len(test) == 8 and train and test and not {p.sha256 for p in train} & {p.sha256 for p in test}
    with pytest.raises(ValueError, match="held out"): sets(folder, folder)
    to_pil(torch.rand(3, 96, 96, generator=g)).save(one/"one.png")
    with pytest.raises(ValueError, match="at least 2 held out"): sets(folder, one)


def test_bad_photographs(config, tmp_path):
    folder = tmp_path/"photos"
    folder.mkdir()
    with pytest.raises(ValueError, match="photos"): sets(folder)
    to_pil(torch.rand(3, 40, 40, generator=generator(0))).save(folder/"small.png")
    held = embedded_photos()[0].path.parent
    run = fill(config, dict(out=str(tmp_path/"x"), photos=[str(folder)], held_out=[str(held)], take=1))
    with pytest.raises(ValueError, match="small.png.*40.*64"): align(run)
    (folder/"cut.png").write_bytes((folder/"small.png").read_bytes()[:200])
    with pytest.raises(ValueError, match="cut.png"): sets(folder)
    assert not (tmp_path/"x").exists()


def test_ready_pairs(config, tmp_path):
    "A folder with lq and gt in place of photographs: the run's inputs are the files"
    for k, p in enumerate(embedded_photos("train")[:5]):
        gt = p.read()[:, :96, :96]
        for name, image in (("gt", gt), ("lq", gt[:, ::4, ::4])):
            write_image(tmp_path/("held" if k > 2 else "train")/name/f"{p.id}.png", image)
    folders = dict(photos=[str(tmp_path/"train")], held_out=[str(tmp_path/"held")], take=0)
    out = align(fill(config, dict(folders, out=str(tmp_path/"run"), steps=1)))
    for bank, n in (("bank", 3), ("bank-after", 2)):
        groups = [read_group(out/bank, i) for i in finished_groups(out/bank)]
        assert len(groups) == n and all(torch.equal(g.lq, g.gt[:, ::4, ::4]) for g in groups)


# ---------------------------------------------------------------- a file of one's own

MINE = """
from dataclasses import dataclass
import torch
from torch import nn
from srnb.core import bicubic
from srnb.paths import Shift
from srnb.policies import PixelCodec, Policy, from_pretrained
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
    stride, lora_targets, config_class = 4, ("middle",), MineConfig
    def __init__(self, config=MineConfig()):
        super().__init__()
        self.config, w = config, config.width
        self.head, self.middle = nn.Conv2d(6, w, 3, padding=1), nn.Conv2d(w, w, 3, padding=1)
        self.tail = nn.Conv2d(w, 3, 3, padding=1)
    def forward(self, x, sigma, lq):
        h = self.head(torch.cat([x, bicubic(lq, x.shape[-2:])], 1)).relu()
        return self.tail(self.middle(h).relu())

class Unknown(Mine): config_class = None
def base(): return Policy(Mine())
POLICY = Policy(Mine())
def shift(): return Policy(Mine(), Shift(), Shift(), PixelCodec())
def trained(): return from_pretrained("base/policy", net=Mine)
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
    for name in ("my.py:base", "my.py:POLICY"):
        a, b = (small_policy(name, "Base.backbone", torch.float32) for _ in range(2))
        assert torch.equal(before, torch.get_rng_state()) and a is not b and a.net is not b.net
        for p, q in zip(a.net.parameters(), b.net.parameters(), strict=True): assert torch.equal(p, q) and p is not q
        a.add_lora(2)
        assert not small_policy(name, "Base.backbone", torch.float32).adapters
        torch.set_rng_state(before) # PEFT draws


def test_own_file(config, mine, capsys, forked):
    """Degradation, reward, metric and network by name: another process ends with the same result; a file that has
    changed is another run"""
    own = dict(backbone="my.py:base", degradation="my.py:averaged", reward="my.py:REWARD",
               judges=["gmsd", "my.py:BRIGHT"])
    def run(): return fill(config, dict(own, out="run", steps=3)) # the file is looked at when a config is made
    first = run()
    conf, metrics = read_run(align(first))
    digest = hashlib.sha256(mine.read_bytes()).hexdigest()
    assert set(metrics.metric) == {"reward", "psnr_y", "bright", "gmsd", "moved", "spread"}
    stands_for = {k: v for k, v in conf["params"]["stands_for"].items() if k.startswith("my.py:")}
    assert stands_for == dict.fromkeys(["my.py:base", "my.py:averaged", "my.py:REWARD", "my.py:BRIGHT"], digest)
    said = conf["params"]["config"]
    assert (said["base"]["backbone"], said["data"]["degradation"], said["judging"]["reward"],
            said["judging"]["judges"]) == tuple(own.values())
    group = read_group("run/bank", finished_groups("run/bank")[0])
    small = torch.nn.functional.avg_pool2d(group.gt, 4)
    assert torch.equal(group.lq, small.mul(255).round().div(255))
    other = forked("-m", "srnb.train", "run/config.json", "--out", "other", cwd=mine.parent)
    assert other.wait() == 0, other.err
    same_result(Path("other"), Path("run"))
    mine.write_text(MINE.replace("STRENGTH = 1.", "STRENGTH = .5"))
    capsys.readouterr()
    assert align(first) == Path("run") and "is done" in capsys.readouterr().out # it has read the file before
    with pytest.raises(RunOccupied, match="my.py:averaged"): align(run())
    mine.write_text(MINE)
    assert align(run()) == Path("run")


def test_own_network_is_trained(config, mine):
    "Supervised and as a one-step network; what is written is a base like any other"
    few = dict(versions=1, max_side=160, patch=36, batch=2, seed=1, degradation="my.py:averaged")
    run = BaseRun("base", init="my.py:base", **few, loop=replace(FEW, steps=20, lr=1e-2))
    log = pd.read_parquet(train_base(run)/"log.parquet")
    assert "mean" not in log and log.loss.iloc[-5:].mean() < log.loss.iloc[:3].mean()
    params = json.loads(Path("base/config.json").read_text())["params"]
    assert set(params["stands_for"]) == {"trained_on", "my.py:base", "my.py:averaged"}
    policy = small_policy("my.py:trained", "init", torch.float32)
    pool = PatchPool(embedded_photos("train")[:1], RESSHIFT_TEST, 1, 160)
    _, logs = sft_loss(pool, policy, run)(0, 0)
    assert set(logs) == {"flow"} and 0 < logs["flow"] < 100
    assert len(read_run(align(fill(config, dict(out="dp2o", backbone="my.py:trained", steps=1))))[1])
    judges, match = ("psnr_y", "my.py:BRIGHT"), Match(refresh=1, match_loop=FEW)
    run = CTMSRRun("one", init="my.py:shift", **few | dict(patch=32), window=32, size=64, eval_m=2, judges=judges,
                   take=2, precision="no", loop=FEW, match=match)
    assert set(read_run(train_ctmsr(run))[1].metric) == {"psnr_y", "bright", "spread"}
    assert json.loads(Path("one/policy/policy.json").read_text())["trained_on"] == "Shift"


def test_stage_one_of_another_file_is_another(mine):
    "Runs that share a first stage do not share it over a change of the file that degrades"
    few = dict(versions=1, max_side=160, patch=32, batch=1, window=32, size=64, eval_m=1, judges=("psnr_y",), take=2)
    def run(out):
        return CTMSRRun(out, init="my.py:shift", degradation="my.py:averaged", **few, banks="shared", precision="no",
                        loop=replace(FEW, steps=1), match=Match("none", match_loop=replace(FEW, steps=1)))
    train_ctmsr(run("a"))
    mine.write_text(MINE.replace("STRENGTH = 1.", "STRENGTH = .5"))
    train_ctmsr(run("b"))
    assert len(list(Path("shared").glob("stage1-*"))) == 2


@pytest.mark.parametrize("change, error, named", [
    (dict(degradation="my.py:nothing"), ValueError, "my.py.*'nothing'"),
    (dict(degradation="my.py:STRENGTH"), ValueError, "degradation.*my.py:STRENGTH"),
    (dict(reward="my.py:BRIGHT"), ValueError, "reward.*Reward.*my.py:BRIGHT"),
    (dict(reward="my.py"), ValueError, "reward.*'my.py'.*NAME"),
    (dict(reward="your.py:REWARD"), FileNotFoundError, "reward.*your.py"),
    (dict(judges=["my.py:base"]), ValueError, "judges.*Metric.*my.py:base"),
    (dict(reward="my.py:REWARD", judges=["my.py:OTHER"]), ValueError, "'psnr_y'"),
    (dict(backbone="my.py:nothing"), ValueError, "my.py.*'nothing'")])
def test_own_file_that_does_not_fit(config, mine, change, error, named):
    with pytest.raises(error, match=named): fill(config, change)


def test_own_file_refused_before_any_work(config, mine, idle):
    run = fill(config, dict(out="x", backbone="my.py:net"))
    with pytest.raises(ValueError, match="my.py:net.*Policy.*Mine"): align(run)
    with pytest.raises(ValueError, match="my.py:lost.*Unknown.*config_class"):
        train_base(BaseRun("x", init="my.py:lost", versions=1, max_side=160))
    assert not Path("x").exists()


def test_prompts_that_nothing_reads_are_refused_before_any_work(config, tmp_path, monkeypatch, idle):
    "A small policy takes empty prompts alone, and the run's folder is not made for others"
    monkeypatch.chdir(tmp_path)
    ids = [p.id for split in ("train", "held_out") for p in embedded_photos(split)[:2]]
    Path("prompts.json").write_text(json.dumps(dict.fromkeys(ids, "a tree")))
    with pytest.raises(ValueError, match="reads no text"): align(fill(config, dict(out="x", prompts="prompts.json")))
    assert not Path("x").exists()


# ---------------------------------------------------------------- preferences from a file

PEOPLE = """
import torch
from srnb.pairs import Pairs
def chosen():
    lq, w, l = torch.load("chosen.pt")
    return Pairs(list(lq), list(w), list(l), torch.ones(len(lq), 1, 1))
def uneven(): p = chosen(); return Pairs(p.lq[:1], p.winners, p.losers, p.weight)
def floats(): p = chosen(); return Pairs(p.lq, [w.float() for w in p.winners], p.losers, p.weight)
def table(): return {}
NONE = 3
"""


@pytest.fixture
def people(tmp_path, monkeypatch):
    "The working folder holds people.py, whose pairs lie beside it"
    monkeypatch.chdir(tmp_path)
    (tmp_path/"people.py").write_text(PEOPLE)
    shapes = (3, 3, 12, 16), (3, 1, 3, 48, 64), (3, 1, 3, 48, 64)
    g = generator(0)
    torch.save([torch.randint(0, 256, o, generator=g, dtype=torch.uint8) for o in shapes], tmp_path/"chosen.pt")


def test_given_pairs(config, people):
    "They are what is trained on, they are in the record, and another bank of them is another run"
    run = fill(config, dict(out="run", pairs="people.py:chosen"))
    out = align(run)
    params = json.loads((out/"config.json").read_text())["params"]
    assert params["config"]["method"]["losers"]["pairs"] == "people.py:chosen"
    assert len(params["stands_for"]["people.py:chosen"]) == len(params["stands_for"]["pairs"]) == 64
    plain = align(fill(config, dict(out="plain", intra=False, inter=False)))
    assert set(json.loads((plain/"config.json").read_text())["params"]["stands_for"]) == {"base", "inputs"}
    a, b = (pd.read_parquet(o/"log.parquet") for o in (out, plain))
    assert a.loss[0] == pytest.approx(b.loss[0]) == pytest.approx(0.693147, abs=1e-6)
    assert not a.gap_w.equals(b.gap_w) and set(read_run(out)[1].metric) == set(read_run(plain)[1].metric)
    lq, w, l = torch.load("chosen.pt")
    torch.save([lq, l, w], "chosen.pt")
    with pytest.raises(RunOccupied, match="pairs"): align(run)


@pytest.mark.parametrize("change, named", [
    (dict(pairs="people.py:uneven"), "people.py:uneven.*1, 3, 3, 3"),
    (dict(pairs="people.py:floats"), "people.py:floats.*group 0"),
    (dict(pairs="people.py:NONE"), "pairs.*people.py:NONE"),
    (dict(pairs="people.py:chosen", patch=64), "people.py:chosen.*patch = 64"),
    (dict(pairs="people.py:table"), "people.py:table.*Pairs.*dict"),
    (dict(losers="Samples", winners="Photograph", pairs="people.py:chosen"), "'pairs'")])
def test_given_pairs_that_do_not_fit(config, people, idle, change, named):
    with pytest.raises(ValueError, match=named): align(fill(config, dict(change, out="x")))
    assert not Path("x").exists()


def test_the_pairs_that_are_recorded_are_those_that_train(config, tmp_path):
    "A function of pairs that answers anew every time is asked once: what it gave is hashed, and trained on"
    from srnb.core import to_bytes
    from srnb.pairs import Pairs
    asked, g = [], generator(5)
    def noisy(*shape): return to_bytes(torch.rand(shape, generator=g))
    def anew():
        asked.append(1)
        return Pairs([noisy(3, 16, 16)], [noisy(1, 3, 64, 64)], [noisy(1, 3, 64, 64)], torch.ones(1, 1, 1))
    run = fill(config, dict(out=str(tmp_path/"run"), losers=replace(config.method.losers, pairs=anew)))
    align(run)
    assert len(asked) == 1


# ---------------------------------------------------------------- what a base of one's own has seen

def test_a_base_that_a_file_reads_has_seen_what_its_folder_says(config, tiny, tmp_path, monkeypatch):
    "The name of a file hides the folder; the policy that comes out of it does not"
    import shutil

    from srnb.core import write_json
    shutil.copytree(tiny, tmp_path/"base")
    write_json(tmp_path/"base"/"photos.json", [p.sha256 for p in embedded_photos("held_out")[:1]])
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("from srnb.policies import from_pretrained\ndef base(): return from_pretrained('base')\n")
    with pytest.raises(ValueError, match="was in the training of"):
        align(fill(config, dict(out="run", backbone="own.py:base")))
    more = BaseRun("more", init="own.py:base", versions=1, max_side=112, patch=32, batch=1, precision="no", loop=FEW)
    seen = set(json.loads((train_base(more)/"policy"/"photos.json").read_text()))
    assert {p.sha256 for p in embedded_photos("held_out")[:1]} < seen and not Path("run").exists()


@pytest.mark.parametrize("text, said", [("import nothing_there", "line 1: ModuleNotFoundError: No module named"),
                                        ("x = 1\ny = x/0", "line 2: ZeroDivisionError"), ("x = (", "SyntaxError")])
def test_a_file_that_cannot_be_imported(mine, capsys, text, said):
    "One line on stderr, which names the file and the line, and exit code 2"
    import srnb.train
    mine.write_text(text)
    for words, error in ((["my.py:RUN"], said), (["nope"], "there is no preset 'nope'"), (["none.json"], "no config"),
                         (["dp2o", "--data.photos", "nowhere"], "no folder at nowhere")):
        with pytest.raises(SystemExit) as e: srnb.train.main(words)
        line = capsys.readouterr().err
        assert e.value.code == 2 and error in line and line.count("\n") == 1, words
    with pytest.raises(SystemExit) as e: srnb.train.main([])
    assert e.value.code == 2 and capsys.readouterr().err.startswith("usage: ")


@pytest.mark.parametrize("make, where", [
    (lambda: Base("smal"), "Base.backbone: no policy 'smal': .*did you mean 'small'"),
    (lambda: BaseRun("x", init="onestp"), "BaseRun.init: no policy 'onestp': .*did you mean 'onestep'"),
    (lambda: fill(Run("x", DP2O), dict(backbone="runs/a/none")), "Base.backbone: no policy 'runs/a/none'")])
def test_a_misspelt_base_is_found_out_when_the_config_is_made(make, where):
    with pytest.raises(FileNotFoundError, match=where): make()


FLAT = [ # a value as papermill, YAML or JSON may bring it; what reaches the run, or the error
    *(("safeguard", o, False) for o in ("false", "False", "no", "off", False)),
    *(("safeguard", o, True) for o in ("true", "yes", "on", True)),
    *(("safeguard", o, "safeguard must be true or false") for o in (0, 1, "0", "maybe", "", None)),
    ("lr", "3e-4", 3e-4), ("steps", "16", 16), ("steps", 16.0, 16), ("steps", 16.5, "steps must be a whole number"),
    ("seed", 1.5, "seed must be a whole number"), ("seed", "7", 7), ("batch", True, "batch must be a whole number"),
    ("lr", "nan", "lr must be a number"), ("loop", 5, "loop must be a Loop"),
    ("kappa", "a lot", "kappa must be a number"), ("photos", 5, "photos must be a list"),
    ("out", 5, "out must be text"), ("judges", "psnr_y", None), ("lam", .1, "there is no 'lam'")]


@pytest.mark.parametrize("door", ["papermill", "json"])
@pytest.mark.parametrize("name, value, want", FLAT, ids=[f"{n}={v!r}" for n, v, _ in FLAT])
def test_no_value_of_another_type_reaches_a_run(tmp_path, name, value, want, door):
    "One sentence with the parameter's name, the rule and what was given; the folder is not claimed"
    def read():
        if door == "papermill": return fill(presets()["dp2o"][1], {name: value})
        file = tmp_path/"config.json" # with the mark that some editors put first
        file.write_text(json.dumps({"preset": "dp2o", name: value}), encoding="utf-8-sig")
        return read_config(file)
    if isinstance(want, str):
        with pytest.raises(ValueError, match=want): read()
    elif want is not None:
        path = next(p for p in leaves(read()) if p.split(".")[-1] == name)
        found = leaves(read())[path][1]
        assert found == want and type(found) is type(want)
    else: assert [m.name for m in read().judging.judges] == ["psnr_y"]


@pytest.mark.parametrize("text, said", [
    ("[1]", "must be a JSON object, got a list"), ("5", "got a int"), ("{", "is not JSON")])
def test_a_config_that_is_no_object_is_refused(tmp_path, text, said):
    (tmp_path/"c.json").write_text(text)
    with pytest.raises(ValueError, match=said): read_config(tmp_path/"c.json")


def test_a_tiny_backbone_that_cannot_be_written_is_one_line(tmp_path, forked):
    (tmp_path/"file").touch()
    run = forked("-m", "srnb.backbones", "sd", str(tmp_path/"file"), cwd=tmp_path)
    assert run.wait() == 1 and "Traceback" not in run.err
    assert run.err.strip().splitlines()[-1].startswith("python -m srnb.backbones: ")

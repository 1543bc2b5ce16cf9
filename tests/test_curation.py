"""Fixture 7: hierarchical weights have mean one, and no affine change of a raw metric moves rewards, pairs or weights;
banks made by many processes"""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch

from srnb import curation
from srnb.core import check_close, generator, quantize
from srnb.curation import (Claims, Ledger, finished_groups, group_seeds, hpo_weights, inter_weight, intra_weight,
                           make_bank, read_group, rehearse, score_bank, share, top_bottom)
from srnb.nets import SmallUNet, UNetConfig
from srnb.policies import Policy
from srnb.rewards import OFFLINE, PSNR_Y, SSIM_Y, GroupMinMax, hybrid


@pytest.mark.parametrize("m, n", [(2, 1), (8, 2), (9, 4), (64, 4)])
@pytest.mark.parametrize("intra, inter", [(False, False), (True, False), (False, True), (True, True)])
def test_mean_one(m, n, intra, inter):
    reward = torch.rand(7, m, generator=generator(m), dtype=torch.float64)
    w, k = top_bottom(reward, n)
    weight = hpo_weights(reward, w, k, intra, inter)
    check_close(weight.mean(), 1., atol=1e-12)
    check_close(intra_weight(reward.gather(1, w), reward.gather(1, k)).mean((1, 2)), torch.ones(7), atol=1e-12)
    check_close(inter_weight(reward).mean(), 1., atol=1e-12)
    if not (intra or inter): assert (weight == 1).all()
    if n == 1 and intra and not inter: check_close(weight, torch.ones(7, 1, 1), atol=1e-12)


def test_affine():
    g, raw = generator(1), {}
    for metric in OFFLINE.metrics: raw[metric.name] = torch.rand(6, 8, generator=g, dtype=torch.float64)
    changed = {name: 3.7*v - 11 for name, v in raw.items()}
    def rewards(scores):
        return torch.stack([hybrid({n: v[i] for n, v in scores.items()}, OFFLINE, GroupMinMax()) for i in range(6)])
    reward, other = rewards(raw), rewards(changed)
    check_close(reward, other, atol=1e-12)
    a, b = top_bottom(reward, 2), top_bottom(other, 2)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    check_close(hpo_weights(reward, *a), hpo_weights(other, *b), atol=1e-12)


def test_winner_is_better():
    "Orientation end to end: the winner of a group has the lower raw score of a metric that falls with quality"
    metric = OFFLINE.fr[0]
    assert not metric.higher_better
    raw = torch.tensor([[.5, .1, .9, .3]])
    reward = torch.stack([GroupMinMax()(raw[0], metric)])
    w, k = top_bottom(reward, 1)
    assert w.item() == 1 and k.item() == 2


# ---------------------------------------------------------------- many processes

GROUPS = 12


def inputs():
    g = generator(5)
    net = SmallUNet(UNetConfig((16, 16), (1, 1), 16)).eval()
    with torch.no_grad():
        for p in net.parameters(): p.copy_(torch.randn(p.shape, generator=g)*.1)
    def image(side): return quantize(torch.rand(3, side, side, generator=g))
    return Policy(net), [(f"photo{k}", image(8), image(32)) for k in range(GROUPS)]


def worker(folder, journal, seconds, stop, until):
    "Curate and score as one of several processes; the journal says which groups it begins"
    torch.set_num_threads(1)
    policy, pairs = inputs()
    name_of, sample, score_group = {group_seeds(i, 3)[0]: i for i, _, _ in pairs}, policy.sample, curation.score_group
    finish, passed = Ledger.finish, Counter()
    def note(text):
        with open(journal, "a") as f: f.write(text+"\n")
    def reach(place): # for the n-th time: "sample 3" stops here and stays until it is killed
        passed[place] += 1
        if stop == f"{place} {passed[place]}":
            Path(f"{journal}.stopped").touch()
            threading.Event().wait()
    def slow(lq, seeds, *rest):
        note(name_of[seeds[0]])
        reach("sample")
        while until and not Path(until).exists(): time.sleep(.005)
        time.sleep(float(seconds))
        return sample(lq, seeds, *rest)
    def noted(ledger, i):
        assert (ledger.folder/"groups"/f"{i}.safetensors").exists() # before its line
        reach("line")
        finish(ledger, i)
    def scored(*a):
        note("score")
        return score_group(*a)
    policy.sample, curation.score_group, Ledger.finish = slow, scored, noted
    Path(f"{journal}.ready").touch()
    while not Path(folder).with_name("go").exists(): time.sleep(.005) # all begin at once
    make_bank(folder, policy, pairs, 3, 2)
    assert [len(read_group(folder, i).sr) for i, _, _ in pairs] == [3]*GROUPS # at once, whoever made them
    score_bank(folder, [PSNR_Y, SSIM_Y]).to_parquet(f"{journal}.parquet")


@pytest.fixture
def launch(tmp_path):
    "Starts a process that curates; none outlives its test"
    here, team = str(Path(__file__).parent), []
    code = f"import sys; sys.path.insert(0, {here!r}); from test_curation import worker; worker(*sys.argv[1:])"
    def one(rank, world=2, seconds=.05, stop="", until=""):
        told = [str(tmp_path/"bank"), str(tmp_path/f"journal{rank}"), str(seconds), stop, str(until)]
        env = dict(os.environ, RANK=str(rank), WORLD_SIZE=str(world), OMP_NUM_THREADS="1")
        with (tmp_path/f"errors{rank}").open("w") as errors:
            team.append(subprocess.Popen([sys.executable, "-c", code, *told], env=env, stdout=subprocess.DEVNULL,
                                         stderr=errors))
        return team[-1]
    yield one
    for p in team:
        p.kill()
        p.wait()


def wait_for(tmp, team, what): # while all are at work
    while not what():
        for r, p in enumerate(team): assert p.poll() is None, (tmp/f"errors{r}").read_text()
        time.sleep(.005)


def start(tmp, team): # when all have loaded
    wait_for(tmp, team, lambda: all((tmp/f"journal{r}.ready").exists() for r in range(len(team))))
    (tmp/"go").touch()


def begun(tmp, rank): return (tmp/f"journal{rank}").read_text().split() if (tmp/f"journal{rank}").exists() else []


def tree(folder): # path -> bytes, of every file; of the configuration what must agree
    paths = [p for p in folder.rglob("*") if not p.name.startswith(".part-")] # what a killed process wrote may stay
    files = {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"folder" for p in paths}
    return dict(files, **{"config.json": json.loads(files["config.json"])["params"]})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A bank and its scores, made by one process"
    folder = tmp_path_factory.mktemp("whole")/"bank"
    make_bank(folder, *inputs(), 3, 2)
    return folder, score_bank(folder, [PSNR_Y, SSIM_Y])


def test_one_manifest(whole):
    assert (whole[0]/"manifest.jsonl").read_text() == "".join(f'{{"id": "photo{k}"}}\n' for k in range(GROUPS))
    assert sorted(p.name for p in whole[0].iterdir()) == ["config.json", "groups", "manifest.jsonl", "scores"]


def test_two_processes(whole, tmp_path, launch, monkeypatch):
    "They open one new folder at once, share groups and scores, and leave what one process leaves; a third does nothing"
    team = [launch(r, seconds=t) for r, t in ((0, .05), (1, .3))] # the fast one takes over from the slow one
    start(tmp_path, team)
    for r, p in enumerate(team): assert p.wait() == 0, (tmp_path/f"errors{r}").read_text()
    each = [begun(tmp_path, r) for r in (0, 1)]
    done = sorted(i for e in each for i in e if i != "score")
    assert done == sorted(f"photo{k}" for k in range(GROUPS)) # every group once
    assert sum(e.count("score") for e in each) == GROUPS # scored once; who did how much is the machine's choice
    assert tree(tmp_path/"bank") == tree(whole[0])
    for r in (0, 1): assert pd.read_parquet(tmp_path/f"journal{r}.parquet").equals(whole[1])
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    policy, pairs = inputs()
    policy.sample = None # nobody may ask
    make_bank(tmp_path/"bank", policy, pairs, 3, 2)
    assert tree(tmp_path/"bank") == tree(whole[0])


@pytest.mark.parametrize("victim, stop", [(0, "sample 3"), (1, "line 2")])
def test_killed(whole, tmp_path, launch, victim, stop):
    "SIGKILL while a group is sampled, or between its file and its line: the other does everything else, and that again"
    other, stopped = 1-victim, tmp_path/f"journal{victim}.stopped"
    team = [launch(r, **(dict(stop=stop) if r == victim else dict(until=stopped))) for r in (0, 1)]
    start(tmp_path, team)
    wait_for(tmp_path, team, lambda: stopped.exists() and len(begun(tmp_path, other)) > 3)
    team[victim].kill()
    assert team[victim].wait() == -signal.SIGKILL
    finished, mine = finished_groups(tmp_path/"bank"), begun(tmp_path, victim)
    assert set(mine[:-1]) < set(finished) and mine[-1] not in finished and len(mine) == int(stop.split()[1])
    assert team[other].wait() == 0, (tmp_path/f"errors{other}").read_text()
    names = Counter(i for r in (0, 1) for i in begun(tmp_path, r) if i != "score")
    assert len(names) == GROUPS and [i for i, n in names.items() if n > 1] == mine[-1:] and names[mine[-1]] == 2
    assert tree(tmp_path/"bank") == tree(whole[0])


def emptied(folder, ids=("a", "b", "c")): # share empty groups; what this call did
    ledger, did = Ledger(folder), []
    def work(i):
        did.append(i)
        ledger.finish(i)
    share(folder/"claims", list(ids), ledger.done, ledger.refresh, work)
    return did


def test_void_claims(tmp_path, monkeypatch):
    "Of an ended process here: at once; of another machine: when untouched; of the living: never, and waiting ends"
    claims = tmp_path/"claims"
    claims.mkdir()
    with subprocess.Popen(["sleep", "60"]) as other:
        mine = Claims(claims)
        os.symlink(f"{mine.me.split()[0]} {other.pid} 1", claims/"a")
        assert not mine.take("a")
        other.kill()
    assert mine.take("a") and mine.void(claims/"no") is None
    mine.drop()
    os.symlink(f"{mine.me.split()[0]} {os.getpid()} 1", claims/"a") # an earlier call of this process
    assert emptied(tmp_path) == ["a", "b", "c"] and not claims.exists() and emptied(tmp_path) == []

    monkeypatch.setattr(curation, "STALE", .4)
    monkeypatch.setattr(curation, "PATIENCE", 1.)
    folder = tmp_path/"gone"
    (folder/"claims").mkdir(parents=True)
    os.symlink("elsewhere/1 1 1", folder/"claims/b")
    begin = time.monotonic()
    assert emptied(folder) == ["a", "c", "b"] and time.monotonic()-begin > .4 and not (folder/"claims").exists()

    folder = tmp_path/"alive"
    monkeypatch.setattr(curation, "BEAT", .1)
    with Claims(folder/"claims") as there:
        there.me = "elsewhere/1 1 1"
        assert there.take("b")
        waited = r"waited \d+ s for 1 that other processes hold.*the first is b"
        with pytest.raises(TimeoutError, match=waited): emptied(folder)
        assert finished_groups(folder) == ["a", "c"]


def test_taken_over_by_one(tmp_path):
    "A void claim that another has just replaced is left to it"
    slow, fast = Claims(tmp_path), Claims(tmp_path)
    fast.me = "elsewhere/1 1 1"
    os.symlink(old := f"{slow.me.split()[0]} {os.getpid()} 0", tmp_path/"a")
    judged = slow.void
    def late(path): # between the judgement and the deed
        text = judged(path)
        if text == old:
            (tmp_path/"a").unlink()
            os.symlink(fast.me, tmp_path/"a")
        return text
    slow.void = late
    assert not slow.take("a") and os.readlink(tmp_path/"a") == fast.me and len(list(tmp_path.iterdir())) == 1


def test_torn_lines(tmp_path, monkeypatch):
    "A torn line counts for nothing, in any manifest; its own process cuts it off, others pass over it"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path/"manifest.jsonl").write_text('{"id": "a"}\n{"id": "b')
    (tmp_path/"manifest-0.jsonl").write_text('{"id": "c"}\n{"id": "d{"id": "e"}\n{"id": "f"}\n')
    (tmp_path/"manifest-1.jsonl").write_text('{"id": "g"}\n{"id"')
    assert sorted(finished_groups(tmp_path)) == ["a", "c", "f", "g"]
    ledger = Ledger(tmp_path)
    ledger.refresh()
    ledger.mend()
    ledger.finish("h")
    ledger.mend()
    assert (tmp_path/"manifest-1.jsonl").read_text() == '{"id": "g"}\n{"id": "h"}\n'
    assert emptied(tmp_path, "abcdefgh") in (["b", "e", "d"], ["b", "d", "e"])
    Ledger(tmp_path).merge("abcdefgh")
    assert finished_groups(tmp_path) == list("abcdefgh") and [p.name for p in tmp_path.iterdir()] == ["manifest.jsonl"]
    ledger.refresh() # a reader that knew the old files
    assert set(ledger.done) == set("abcdefgh")


@pytest.mark.parametrize("rank, world", [(0, 1), (3, 5), (63, 64)])
def test_alone_of_many(tmp_path, monkeypatch, rank, world):
    "The only survivor does everything, each group once; its own share first"
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    ids = [f"g{k}" for k in range(200)]
    did = emptied(tmp_path, ids)
    assert sorted(did) == sorted(ids) and did[:len(ids[rank::world])] == ids[rank::world]


def test_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK=2, WORLD_SIZE=2"): emptied(tmp_path)


def test_rehearsal(tmp_path):
    "Empty groups, three processes, five killed at random: nothing is lost, no more begun twice than processes died"
    tried = rehearse(tmp_path, groups=4000, processes=3, kills=5, sync=False, seed=7)
    assert 0 <= tried["again"] <= 5 and tried["most_claims"] <= 3+5 and tried["bytes"] == 24
    assert not list(tmp_path.glob("manifest-*"))

"""Fixture 7: hierarchical weights have mean one, and no affine change of a raw metric moves rewards, pairs or weights;
banks made by many processes"""
import functools
import json
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
from filelock import FileLock

from srnb import curation
from srnb.core import check_close, generator, quantize
from srnb.curation import (MadeHere, finished_groups, group_seeds, hpo_weights, inter_weight, intra_weight, make_bank,
                           ray_engine, read_group, score_bank, share, top_bottom)
from srnb.nets import SmallUNet, UNetConfig
from srnb.policies import Policy
from srnb.rewards import OFFLINE, PSNR_Y, SSIM_Y, GroupMinMax, hybrid
from srnb.runs import evaluate


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
    replace_file, write_table, passed = curation.replace_file, curation.write_table, Counter()
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
        while until and not until.exists(): time.sleep(.005)
        time.sleep(seconds)
        return sample(lq, seeds, *rest)
    def placed(path, write):
        def written(tmp):
            write(tmp)
            reach("write") # whole, but not in its place
        replace_file(path, written)
        reach("place")
    def scored(*a):
        note("score")
        return score_group(*a)
    def noted(*a):
        reach("table")
        return write_table(*a)
    policy.sample, curation.score_group, curation.replace_file, curation.write_table = slow, scored, placed, noted
    Path(f"{journal}.ready").touch()
    while not folder.with_name("go").exists(): time.sleep(.005) # all begin at once
    make_bank(folder, policy, pairs, 3, 2)
    assert [len(read_group(folder, i).sr) for i, _, _ in pairs] == [3]*GROUPS # at once, whoever made them
    score_bank(folder, [PSNR_Y, SSIM_Y]).to_parquet(f"{journal}.parquet")


@pytest.fixture
def launch(tmp_path, forked):
    "Starts a process that curates; none outlives its test"
    def one(number, world=2, seconds=.05, stop="", until=""): # world 1: a launch of its own
        env = dict(RANK=str(number if world > 1 else 0), WORLD_SIZE=str(world), OMP_NUM_THREADS="1")
        return forked(worker, tmp_path/"bank", tmp_path/f"journal{number}", seconds, stop, until, **env)
    return one


def wait_for(team, what): # while all are at work
    while not what():
        for p in team: assert p.poll() is None, p.err
        time.sleep(.005)


def start(tmp, team): # when all have loaded
    wait_for(team, lambda: all((tmp/f"journal{r}.ready").exists() for r in range(len(team))))
    (tmp/"go").touch()


def begun(tmp, number): # groups that it sampled, and "score" for each that it scored
    return (tmp/f"journal{number}").read_text().split() if (tmp/f"journal{number}").exists() else []


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


def unasked(folder): # continue a bank whose groups are all there: the policy may not be asked
    policy, pairs = inputs()
    policy.sample = None
    return make_bank(folder, policy, pairs, 3, 2)


@pytest.mark.parametrize("world", [2, 1])
def test_two_processes(whole, tmp_path, launch, monkeypatch, world):
    """Of one launch, or of two that know nothing of each other: both open one new folder at once, no group is made
    twice, and they leave what one process leaves; a third does nothing"""
    team = [launch(r, world, t) for r, t in ((0, .02), (1, .1))]
    start(tmp_path, team)
    for p in team: assert p.wait() == 0, p.err
    each = [begun(tmp_path, r) for r in (0, 1)]
    done = sorted(i for e in each for i in e if i != "score")
    assert done == sorted(f"photo{k}" for k in range(GROUPS)) # every group once
    assert sum(e.count("score") for e in each) == GROUPS # scored once; who did how much is the machine's choice
    assert tree(tmp_path/"bank") == tree(whole[0])
    for r in (0, 1): assert pd.read_parquet(tmp_path/f"journal{r}.parquet").equals(whole[1])
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert tree(unasked(tmp_path/"bank")) == tree(whole[0])


@pytest.mark.parametrize("victim, stop", [(0, "sample 3"), (1, "write 2")])
def test_killed(whole, tmp_path, launch, victim, stop):
    "SIGKILL while a group is sampled, or before its file takes its place: the other does all else, and that again"
    other, stopped = 1-victim, tmp_path/f"journal{victim}.stopped"
    team = [launch(r, **(dict(stop=stop) if r == victim else dict(until=stopped))) for r in (0, 1)]
    start(tmp_path, team)
    wait_for(team, lambda: stopped.exists() and len(begun(tmp_path, other)) > 3)
    team[victim].kill()
    assert team[victim].wait() == -signal.SIGKILL
    finished, mine = finished_groups(tmp_path/"bank"), begun(tmp_path, victim)
    assert set(mine[:-1]) < set(finished) and mine[-1] not in finished and len(mine) == int(stop.split()[1])
    assert team[other].wait() == 0, team[other].err
    names = Counter(i for r in (0, 1) for i in begun(tmp_path, r) if i != "score")
    assert len(names) == GROUPS and [i for i, n in names.items() if n > 1] == mine[-1:] and names[mine[-1]] == 2
    assert tree(tmp_path/"bank") == tree(whole[0])


@pytest.mark.parametrize("stop", ["sample 3", "write 1", "place 2", "table 3"])
def test_killed_alone(whole, tmp_path, launch, stop):
    "Another launch waits while the first is at work; after its SIGKILL it goes on, and nothing is lost or torn"
    first, stopped = launch(0, 1, 0, stop), tmp_path/"journal0.stopped"
    start(tmp_path, [first])
    wait_for([first], stopped.exists)
    second = launch(1, 1, 0)
    wait_for([first, second], (tmp_path/"journal1.ready").exists)
    time.sleep(.3)
    assert begun(tmp_path, 1) == [] # it waits for the lock
    first.kill()
    assert first.wait() == -signal.SIGKILL and second.wait() == 0, second.err
    place, n = stop.split()
    again = dict(sample="photo2", write="photo0", table="score").get(place) # what was in work
    both = Counter(begun(tmp_path, 0)+begun(tmp_path, 1))
    want = Counter([f"photo{k}" for k in range(GROUPS)] + ["score"]*GROUPS + [again]*(again is not None))
    assert both == want and tree(tmp_path/"bank") == tree(whole[0])
    assert pd.read_parquet(tmp_path/"journal1.parquet").equals(whole[1])


def test_killed_at_random(whole, tmp_path, launch):
    "SIGKILL at any moment, again and again: what is there is whole, and each kill costs at most the group in work"
    chance, kills = random.Random(0), 8
    (tmp_path/"go").touch()
    def left(): # of the groups that are there
        paths = (tmp_path/"bank"/"groups").glob("photo*.safetensors")
        return {p.name: p.read_bytes() for p in paths}
    for k in range(kills):
        run = launch(k, 1, .01)
        wait_for([run], (tmp_path/f"journal{k}.ready").exists)
        run.wait(chance.uniform(0, .15))
        run.kill()
        run.wait()
        for name, data in left().items(): assert data == (whole[0]/"groups"/name).read_bytes()
    last = launch(kills, 1, 0)
    assert last.wait() == 0, last.err
    names = Counter(i for k in range(kills+1) for i in begun(tmp_path, k) if i != "score")
    assert len(names) == GROUPS and sum(names.values()) <= GROUPS+kills
    assert tree(tmp_path/"bank") == tree(whole[0])


def test_waiting_ends(tmp_path, launch, monkeypatch):
    "A process that hangs with a lock is not waited for for ever, and all that it does not hold is done"
    hung = launch(1, stop="sample 2")
    start(tmp_path, [])
    wait_for([hung], (tmp_path/"journal1.stopped").exists)
    monkeypatch.setattr(curation, "PATIENCE", 1.)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TimeoutError, match=r"groups of 3: .*\.lock-1 has finished none for 1 s, and photo3 is missing"):
        make_bank(tmp_path/"bank", *inputs(), 3, 2)
    assert hung.poll() is None
    assert finished_groups(tmp_path/"bank") == [f"photo{k}" for k in range(GROUPS) if k == 1 or k%2 == 0]
    hung.kill()
    hung.wait()
    make_bank(tmp_path/"bank", *inputs(), 3, 2)
    assert len(finished_groups(tmp_path/"bank")) == GROUPS


def touched(folder, ids): # make empty files; which of them this call made
    made = []
    def work(i):
        made.append(i)
        (folder/i).touch()
    share(folder, ids, lambda i: (folder/i).exists(), work)
    return made


def test_patience(tmp_path, monkeypatch):
    "Whoever is waited for may take its time, as long as it finishes something"
    monkeypatch.setattr(curation, "PATIENCE", 2.)
    ids = [f"g{k}" for k in range(6)]
    def other():
        with FileLock(tmp_path/".lock-0"):
            held.set()
            for i in ids:
                time.sleep(.8)
                (tmp_path/i).touch()
    held, thread = threading.Event(), threading.Thread(target=other)
    thread.start()
    held.wait()
    assert touched(tmp_path, ids) == []
    thread.join()


@pytest.mark.parametrize("rank, world", [(0, 1), (3, 5), (63, 64)])
def test_alone_of_many(tmp_path, monkeypatch, rank, world):
    "A rank whose others never come does everything, each group once; its own share first"
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    ids = [f"g{k}" for k in range(200)]
    did = touched(tmp_path, ids)
    assert sorted(did) == sorted(ids) and did[:len(ids[rank::world])] == ids[rank::world]


def test_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK=2, WORLD_SIZE=2"): touched(tmp_path, ["a"])


def judging(bank, journal, together):
    "Evaluate as one of two processes; the journal has a line for each group that it scores"
    score_group = curation.score_group
    def scored(*a):
        with open(journal, "a") as f: f.write(f"{len(a[1])}\n")
        time.sleep(.05)
        return score_group(*a)
    curation.score_group = scored
    Path(f"{journal}.ready").touch()
    while not all(o.exists() for o in together): time.sleep(.005)
    evaluate(dict(before=bank), finished_groups(bank), [PSNR_Y, SSIM_Y], mean=True).to_parquet(f"{journal}.parquet")


def test_two_judge_together(whole, tmp_path, forked):
    "Each group's candidates, its mean and its enlarged input are scored once, by either; both have the whole table"
    bank, other = (shutil.copytree(whole[0], tmp_path/n, ignore=shutil.ignore_patterns("scores")) for n in "ab")
    journals = [tmp_path/f"journal{r}" for r in (0, 1)]
    together = [Path(f"{o}.ready") for o in journals]
    team = [forked(judging, bank, o, together, RANK=str(r), WORLD_SIZE="2") for r, o in enumerate(journals)]
    for p in team: assert p.wait() == 0, p.err
    each = [o.read_text().split() for o in journals]
    assert Counter(each[0]+each[1]) == {"3": GROUPS, "1": 2*GROUPS} and min(map(len, each)) > GROUPS
    alone = evaluate(dict(before=other), finished_groups(bank), [PSNR_Y, SSIM_Y], mean=True)
    for o in journals: assert pd.read_parquet(f"{o}.parquet").equals(alone)
    assert set(alone.variant) == {"before", "bicubic", "mean"}


def test_earlier_version(whole, tmp_path):
    "A bank with a manifest and with claims, which an earlier version wrote, is read, continued and scored"
    bank = shutil.copytree(whole[0], tmp_path/"bank")
    (bank/"manifest.jsonl").write_text('{"id": "photo1"}\n{"id": "photo0"}\n{"id": "pho')
    (bank/"claims").mkdir()
    os.symlink("elsewhere/1 1 1", bank/"claims"/"photo2")
    assert finished_groups(unasked(bank)) == [f"photo{k}" for k in range(GROUPS)]
    assert score_bank(bank, [PSNR_Y, SSIM_Y]).equals(whole[1])


def test_read_only(whole, monkeypatch):
    "What is finished is read without a lock, so also where nothing can be written"
    def refused(*a, **k): raise AssertionError("a lock was asked for")
    monkeypatch.setattr(curation.FileLock, "acquire", refused)
    assert score_bank(unasked(whole[0]), [SSIM_Y, PSNR_Y]).equals(whole[1])


# ---------------------------------------------------------------- a cluster

LAME = "raise ImportError('what jsonschema does without takes seconds to import, in each of the processes of Ray')"


@pytest.fixture(scope="module")
def ray(tmp_path_factory):
    "A local Ray of two CPUs, whose workers find this module; gone afterwards"
    (folder := tmp_path_factory.mktemp("ray")/"quick").mkdir()
    (folder/"rfc3987_syntax.py").write_text(LAME)
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (folder, here, here.parent))))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        import ray
        ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield ray
        ray.shutdown()


class Mortal(Policy):
    "Notes what it samples; at its third group the first process that comes to it ends"
    def __init__(self, net, names, journal):
        super().__init__(net)
        self.names, self.journal = names, journal

    def sample(self, lq, seeds, *rest):
        name = self.names[seeds[0]]
        with open(self.journal, "a") as f: f.write(f"{os.getpid()} {name}\n")
        if name == "photo2":
            try: os.mkdir(f"{self.journal}.died")
            except FileExistsError: pass
            else: os._exit(1)
        return super().sample(lq, seeds, *rest)


def mortal(journal):
    policy, pairs = inputs()
    return Mortal(policy.net, {group_seeds(i, 3)[0]: i for i, _, _ in pairs}, journal)


@pytest.mark.slow
def test_ray(whole, tmp_path, ray, monkeypatch):
    "Two workers, one of them killed: the bank and its scores are those of one process, and a second call does nothing"
    journal, engine = tmp_path/"journal", ray_engine(2)
    policy, (_, pairs) = MadeHere(functools.partial(mortal, journal)), inputs()
    monkeypatch.chdir(tmp_path)
    make_bank("bank", policy, pairs, 3, 2, engine=engine)
    said = [line.split() for line in journal.read_text().splitlines()]
    names = Counter(name for _, name in said)
    assert len({pid for pid, _ in said}) == 3 and Path(f"{journal}.died").exists()
    assert names == Counter({f"photo{k}": 1+(k == 2) for k in range(GROUPS)})
    assert score_bank("bank", [PSNR_Y, SSIM_Y], engine=engine).equals(whole[1])
    assert tree(tmp_path/"bank") == tree(whole[0])
    monkeypatch.setattr(ray.data, "from_items", None)
    make_bank("bank", policy, pairs, 3, 2, engine=engine)
    assert score_bank("bank", [SSIM_Y, PSNR_Y], engine=engine).equals(whole[1])
    assert len(journal.read_text().splitlines()) == len(said)


def fail(i):
    if i == "b": raise ValueError("no such picture")
    if i == "c": os._exit(1)


@pytest.mark.slow
@pytest.mark.parametrize("ids, message", [("ab", "groups: b: ValueError: no such picture"),
                                          ("c", "workers died of a group again and again")])
def test_ray_tells_what_went_wrong(tmp_path, ray, ids, message):
    engine = ray_engine(1, tries=1)
    with pytest.raises(RuntimeError, match=message): engine(tmp_path, list(ids), lambda i: False, fail)


def test_a_policy_that_is_made_where_it_is_used(whole):
    "What is sent is the function; the policy's answers and its fingerprint are its own"
    made = []
    def make():
        made.append(1)
        return inputs()[0]
    there = MadeHere(make)
    assert not made and MadeHere.__reduce__(there) == (MadeHere, (make,)) and not made
    assert curation.fingerprint(there) == curation.fingerprint(inputs()[0]) and there.sampler is there.sampler
    assert made == [1]
    with pytest.raises(AttributeError, match="no_such"): _ = there.no_such

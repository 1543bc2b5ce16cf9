"The brake: an alarm on a run that hacks its reward, none on equal data, the last good copy, resumption, bad input"
import functools
import json
from dataclasses import fields, replace

import pandas as pd
import peft
import pytest
import torch
from conftest import same_result
from multi_worker import work
from safetensors.torch import load_file
from test_multi import said, team

import srnb.align
import srnb.brake
import srnb.runs
from srnb import core
from srnb.align import DP2O, SFT, Run, Top, align
from srnb.brake import Brake, Watch, falls, last_good, rings, sign_flips, verdicts
from srnb.core import check_close, read_run, to_pil
from srnb.curation import read_group
from srnb.data import embedded_photos
from srnb.pairs import Logistic
from srnb.rewards import PIQE, PSNR_Y, SSIM_Y, ST_LPIPS_VGG, Metric, Reward
from srnb.runs import Base, Data, Judging
from srnb.train import run_of
from srnb.training import Loop


def brightness(): return lambda sr, gt: sr.mean((1, 2, 3)).double()


BRIGHT = Reward("bright", nr=(Metric("bright", "nr", True, brightness),)) # nobody wants brighter pictures
LOOP = Loop(steps=6, lr=.1, warmup=1, save_every=2, log_every=1, keep_every=1, log_with="none")


@pytest.fixture(scope="module")
def hack(tiny, tmp_path_factory):
    "A run that is rewarded for brightness alone; five held-out photographs"
    with pytest.MonkeyPatch.context() as patch: # what costs time and decides nothing
        patch.setattr(core, "git_revision", lambda: None)
        patch.setattr(core, "versions", functools.cache(core.versions))
        patch.setattr(peft.PeftModel, "create_or_update_model_card", lambda *a: None)
        for room in (srnb.align, srnb.runs): patch.setattr(room, "freed", lambda: None)
        yield hacking(tiny, tmp_path_factory)


def hacking(tiny, tmp_path_factory):
    top, photos = tmp_path_factory.mktemp("brake"), embedded_photos("train")
    for name, some in (("train", photos[:2]), ("held", photos[2:7])):
        (top/name).mkdir()
        for p in some: to_pil(p.read()[:, 60:156, 80:192].contiguous()).save(top/name/f"{p.id}.png")
    data = Data((str(top/"train"),), (str(top/"held"),), size=48, places=1)
    judging = Judging(BRIGHT, m=4, judges=("psnr_y",), eval_m=2)
    return Run(str(top/"free"), replace(DP2O, winners=Top(2), link=Logistic(10.)), data,
               Base(str(tiny), precision="no", sample_steps=1), judging, LOOP, rank=2, batch=1, patch=32,
               banks=str(top/"banks"))


def of(run, name, **brake): # the floor keeps the first look, where little has moved, apart from the second
    return replace(run, out=run.out.replace("free", name), brake=Brake(**dict(look_m=2, floor=2.) | brake))


@pytest.fixture(scope="module")
def stopped(hack): return align(of(hack, "stopped", stop="judge"))


@pytest.fixture(scope="module")
def warned(hack): return align(of(hack, "warned"))


def told(out): return json.loads((out/"brake.json").read_text())
def looks(out): return pd.read_parquet(out/"look.parquet")
def adapter(out): return load_file(out/"adapter"/"adapter_model.safetensors")


def kept(out, step): # as an adapter's file names its weights
    weights = load_file(out/"kept"/f"{step:08d}.safetensors")
    return {n.replace(".policy.", "."): w for n, w in weights.items()}


def same(a, b): return sorted(w.sum().item() for w in a.values()) == sorted(w.sum().item() for w in b.values())


def test_a_hacked_reward_rings_and_the_run_ends_with_its_last_good_copy(stopped, warned):
    "The adapter is that of the run that goes on, at the last look before the reward rose and the judge fell"
    record, table = told(stopped), looks(stopped)
    means = table.groupby(["metric", "step"]).value.mean()
    end, good = record["ended"], record["kept"]
    assert 0 < good < end < LOOP.steps and {o["judge"] for o in record["alarms"]} == {"psnr_y"}
    assert record["planned"] == [2, 4, 6] and record["looks"] == list(range(0, end+1, 2))
    assert means["reward", end] > means["reward", 0] and means["psnr_y", end] < means["psnr_y", 0]
    assert same(adapter(stopped), kept(warned, good)) and same(adapter(warned), kept(warned, LOOP.steps))
    assert not any(same(adapter(stopped), kept(warned, k)) for k in range(1, LOOP.steps+1) if k != good)
    logs = [pd.read_parquet(o/"log.parquet") for o in (stopped, warned)]
    assert len(logs[0]) == end and logs[0].equals(logs[1][:end])


@pytest.mark.slow
def test_looks_leave_training_as_it_was(warned, hack): same_result(warned, align(hack))


def test_a_brake_that_warns_looks_on(warned, stopped):
    record = told(warned)
    assert record["ended"] is None and record["kept"] is None and record["alarms"][0] == told(stopped)["alarms"][0]
    assert looks(warned)[:len(looks(stopped))].equals(looks(stopped)) and record["looks"] == [0, 2, 4, 6]


def test_the_first_and_the_last_look_are_the_banks_before_and_after(warned, hack):
    "Judge, reward and colour of the samples that every run reports"
    metrics, table = read_run(warned)[1], looks(warned)
    for step, variant in ((0, "before"), (6, "after")):
        for metric in ("psnr_y", "bright", "reward"):
            keys = ["image", "seed"]
            a = metrics[(metrics.variant == variant) & (metrics.metric == metric)]
            b = table[(table.step == step) & (table.metric == metric)]
            a, b = (o.set_index(keys).value.sort_index() for o in (a, b))
            assert len(a) == 10 and a.index.equals(b.index)
            check_close(a.to_list(), b.to_list(), rtol=1e-12)
    group = read_group(warned/"bank-after", table.image[0])
    shift = 255*(group.sr.mean((2, 3))-group.lq.mean((1, 2)))
    rows = table[(table.step == 6) & (table.metric == "colour_shift") & (table.image == group.id)]
    check_close(rows.value.to_list(), shift.square().mean(1).sqrt().tolist(), rtol=1e-6)
    errors = table[table.metric.isin(["error_patch", "error_whole"])]
    assert (errors[errors.step == 0].value == 0).all() and (errors[errors.step == 6].value != 0).all()


def test_the_same_numbers_at_every_look_never_ring(tmp_path):
    watched(tmp_path, Brake(alpha=.9, floor=0., stop="judge"), [.1]*6, [.2]*6)
    assert told(tmp_path)["alarms"] == [] and told(tmp_path)["looks"] == [0, 10, 20, 30, 40, 50]


@pytest.mark.slow
def test_equal_data_never_rings(hack):
    "A policy that does not move has changes of exactly zero, whatever the level"
    run = of(replace(hack, loop=replace(LOOP, lr=1e-12, steps=2)), "still", alpha=.9, floor=0., stop="judge")
    out = align(run)
    assert told(out)["alarms"] == [] and told(out)["looks"] == [0, 2]
    means = looks(out).pivot_table(index="step", columns=["metric", "image", "seed"], values="value")
    means = means[["psnr_y", "reward"]]
    assert (means == means.loc[0]).all(axis=None)


@pytest.mark.slow
@pytest.mark.parametrize("what, call", [("measured", 2), ("whole_again", 0)])
def test_killed_and_resumed(hack, stopped, deadly, monkeypatch, what, call):
    "In a look and after the alarm: the same looks, log, adapter and record; none is made twice"
    count, calls, die = deadly
    count(srnb.align, "measured")
    if what != "measured": count(srnb.align, what)
    run, die[what] = of(hack, f"cut-{what}-{call}", stop="judge"), call
    with pytest.raises(KeyboardInterrupt, match=what): align(run)
    die.clear()
    out = align(run)
    assert calls["measured"] == len(told(out)["looks"])
    assert looks(out).equals(looks(stopped)) and told(out) == told(stopped)
    same_result(out, stopped)


@pytest.mark.slow
def test_two_processes_are_one(hack, stopped, forked, tmp_path):
    "Each looks at its own photographs; both end at the same look"
    run = of(replace(hack, judging=Judging("offline_nr", m=4, judges=("psnr_y",), eval_m=2), banks=None,
                     data=replace(hack.data, size=64), loop=replace(LOOP, steps=4, parts=2)), "one", stop="judge",
             alpha=.9, floor=5.)
    one, two = align(run), tmp_path/"two"
    done = team(forked, work, said(run, two), 2, False)
    assert not any(o.wait() for o in done), "".join(o.err for o in done)
    assert looks(one).equals(looks(two)) and told(one) == told(two)
    same_result(one, two)


@pytest.mark.parametrize("change, named", [
    (dict(look_every=3), "look_every = 3 is no multiple of loop.save_every = 2"),
    (dict(look_m=4), "look_m = 4 is more than judging.eval_m = 2"),
    (dict(look_m=1), "look_m .* 2, got 1"), (dict(alpha=0.), r"alpha .* \(0, 1\), got 0"), (dict(floor=-1.), "floor"),
    (dict(stop="now"), "Brake.stop.*'now'"), (dict(watched=BRIGHT.nr), "watched: bright is in the reward bright")])
def test_refused_when_the_config_is_made(hack, change, named):
    with pytest.raises(ValueError, match=named): replace(hack, brake=Brake(**dict(look_m=2) | change))


def test_refused_with_the_rest_of_the_run(hack, tmp_path, idle):
    brake = Brake(look_m=2, stop="judge")
    for change, named in ((dict(judging=Judging(None, eval_m=2)), "set judging.reward"),
                          (dict(judging=Judging(BRIGHT, judges=BRIGHT.nr, eval_m=2)), "all of judging.judges"),
                          (dict(drift=.1), "Run.drift = 0.1"),
                          (dict(loop=replace(hack.loop, ema=.9)), "Loop.ema = 0.9"),
                          (dict(rounds=2, method=hack.method), "Run.brake looks at one training")):
        with pytest.raises(ValueError, match=named): replace(hack, **dict(brake=brake, method=SFT) | change)
    few = replace(hack, brake=brake, out=str(tmp_path/"few"), data=replace(hack.data, take=4))
    with pytest.raises(ValueError, match="4 held-out photographs .* hold out at least 5"): align(few)
    assert not (tmp_path/"few").exists()


# ---------------------------------------------------------------- the test, and what it says

def test_patterns():
    assert sign_flips(5).shape == (32, 5) and len(sign_flips(5).unique(dim=0)) == 32
    many = sign_flips(40)
    assert many.shape == (4096, 40) and (many[0] == 1).all() and torch.equal(many, sign_flips(40))
    assert abs(many[1:].mean()) < .01 and set(many.unique().tolist()) == {-1., 1.}


def test_three_photographs_by_hand():
    "d = (-1, -2, -2), norm 3: eight patterns give 5/3, 1, 1/3 (twice) and their opposites; half may ring, in two looks"
    d = torch.tensor([-1., -2., -2.]).view(1, 3, 1)
    evidence, bound = falls(torch.cat([d, -d]), .5, 2)
    check_close(evidence[:, 0].tolist(), [5/3, -5/3], atol=1e-12)
    # first look: 2 of 8 patterns: 5/3 and 1, the bound is 1/3. Second: 2 more, of opposite signs: bound 1/3 again
    check_close(bound.tolist(), [1/3, 1/3], atol=1e-8)
    assert rings(evidence, bound)[:, 0].tolist() == [True, True] # what has fallen counts as fallen
    assert falls(d, .1, 1)[1] > 5/3 # no pattern of eight may ring


def test_every_further_judge_and_look_has_its_price():
    g = torch.Generator().manual_seed(0)
    d = torch.randn(200, 3, 8, 4, generator=g, dtype=torch.float64)
    def bound(judges, planned): return falls(d[..., :judges], .05, planned)[1][:, 0].mean().item()
    assert bound(1, 3) < bound(2, 3) < bound(4, 3) and bound(1, 3) < bound(1, 6) < bound(1, 12)
    twice = falls(d[..., :1].expand(-1, -1, -1, 2), .05, 3)[1] # the same judge again costs nothing
    check_close(twice, falls(d[..., :1], .05, 3)[1], atol=1e-12)


class Tracker:
    def __init__(self): self.seen = {}
    def log(self, values, step): self.seen[step] = values


def toy_table(reward, judge, photos=6):
    def rows(k, r, j):
        values = dict(reward=r, psnr_y=j, error_patch=-k, error_whole=-2*k)
        return [dict(image=f"p{i}", seed=s, metric=m, value=v*(1+.1*i)+.1*s*(m[0] != "e"))
                for i in range(photos) for s in range(2) for m, v in values.items()]
    return {10*k: rows(k, r, j) for k, (r, j) in enumerate(zip(reward, judge, strict=True))}


CURVE = ([0., .1, .2, .3, .4, .5], [0., .2, 0., -.2, -.6, -.9])


def watched(out, brake, reward=CURVE[0], judge=CURVE[1], judges=(PSNR_Y,)):
    rows, w, tracker = toy_table(reward, judge), torch.zeros(1), Tracker()
    watch = Watch(brake, out, judges, brake.looks(50, 10), lambda step: rows[step], lambda: dict(w=w))
    for step in range(0, 60, 10):
        w.fill_(step)
        if watch(step, [tracker]): break
    return watch, tracker


FIELDS = dict( # field -> another value, what it changes
    look_every=(20, "looks"), watched=((PIQE,), "judges"), alpha=(.017, "alarms"), floor=(9., "alarms"),
    stop=("judge", "ended"))


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    out = tmp_path_factory.mktemp("usual")
    watched(out, Brake())
    return told(out)


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_changed_alone_changes_what_is_said(tmp_path, usual, field):
    value, where = FIELDS[field]
    assert {f.name for f in fields(Brake)} == {*FIELDS, "look_m"} # of look_m: tests/test_guards_runs.py
    brake = replace(Brake(), **{field: value})
    if field == "watched": assert brake.judges(Judging()) == [PIQE] != Brake().judges(Judging())
    else:
        watched(tmp_path, brake)
        other = told(tmp_path)
        assert usual[where] != other[where]
        if where == "alarms": assert other["alarms"][0]["step"] > usual["alarms"][0]["step"]


def test_trackers_and_copy(tmp_path, capsys):
    watch, tracker = watched(tmp_path, Brake(stop="judge"))
    end = watch.ended
    assert sorted(tracker.seen) == list(range(0, end+1, 10)) and tracker.seen[end]["look/transfer"] == 2.
    table = looks(tmp_path)
    for step, seen in tracker.seen.items():
        rows = table[(table.step == step) & (table.metric == "psnr_y")]
        assert seen["look/psnr_y"] == pytest.approx(rows.value.mean())
    good = told(tmp_path)["kept"]
    assert watch.good()["w"].item() == good == last_good(watch.said(end)) == 20
    out = capsys.readouterr().out
    assert f"BRAKE at step {end}" in out and f"keeps step {good}" in out and out.count("look at step") == end//10+1


def test_a_look_that_was_cut_is_made_again_and_no_other(tmp_path, monkeypatch):
    "Killed before a look's table is written, with its copy already there"
    brake, write = Brake(stop="judge"), srnb.brake.write_table
    whole, _ = watched(tmp_path/"whole", brake)
    def dying(path, table):
        if table.step.max() == 20: raise KeyboardInterrupt("killed")
        write(path, table)
    monkeypatch.setattr(srnb.brake, "write_table", dying)
    with pytest.raises(KeyboardInterrupt): watched(tmp_path/"cut", brake)
    assert looks(tmp_path/"cut").step.max() == 10
    monkeypatch.undo()
    again, tracker = watched(tmp_path/"cut", brake)
    assert sorted(tracker.seen) == [20, 30] and again.ended == whole.ended == 30
    assert looks(tmp_path/"cut").equals(looks(tmp_path/"whole")) and told(tmp_path/"cut") == told(tmp_path/"whole")
    assert torch.equal(again.good()["w"], whole.good()["w"])
    once_more, tracker = watched(tmp_path/"cut", brake)
    assert not tracker.seen and once_more.ended == 30


def test_a_judge_that_comes_back_is_forgiven(tmp_path):
    "Doubtful at step 20, good at 30: what is kept is 30"
    rows = toy_table([0, .1, .2, .3, .4], [0, .1, -.5, .1, -.8])
    table = pd.DataFrame([dict(o, step=step) for step, some in rows.items() for o in some])
    said = verdicts(table, [PSNR_Y], Brake(), 8)
    assert said.doubtful.tolist() == [False, True, False, True] and last_good(said) == 30


def test_what_the_page_says_of_its_record(root):
    "compare_brake's words, recomputed: who rings and when, lines, rewards, and that no judge leaves its floor"
    looks = pd.read_parquet(root/"nbs/_records/brake/look.parquet").astype(dict(row=str, metric=str, image=str))
    told = {(o["row"], o["training"]): o for o in json.loads((root/"nbs/_records/brake/brakes.json").read_text())}
    config = json.loads((root/"nbs/_records/brake/config.json").read_text())["params"]["brake"]
    brake = Brake(**{k: config[k] for k in ("look_every", "look_m", "alpha", "floor")})
    judges, first, end = [PSNR_Y, SSIM_Y, ST_LPIPS_VGG], {}, {}
    for (row, seed), table in looks.groupby(["row", "training"]):
        said = verdicts(table, judges, brake, len(told[row, seed]["planned"]))
        rung = said[said.alarm]
        first[row, seed] = int(rung.step.min())
        assert not {*rung.judge} & {m.name for m in judges}
        assert "line_excess" in set(rung.judge[rung.step == rung.step.min()])
        lines = table[table.metric == "line_excess"].groupby("step").value.mean()
        end[row, seed] = lines[lines.index.max()], said.reward.iloc[-1]
        if row == "hack": assert [round(lines[k], 1) for k in (0, 40)] == [1.7, 4.3] and round(lines[60]) == 25
    assert [first["default", k] for k in range(3)] == [40, 60, 40]
    assert first["hack", 0] == first["hack, stopped", 0] == 40
    assert told["hack, stopped", 0]["kept"] == 30 and told["hack, stopped", 0]["ended"] == 40
    lines, rewards = zip(*(end["default", k] for k in range(3)), strict=True)
    assert (round(min(lines), 1), round(max(lines), 1)) == (2.2, 4.2)
    assert (round(min(rewards), 3), round(max(rewards), 3)) == (.012, .017)


def test_an_option_of_the_brake_names_it():
    run = run_of(["dp2o", "--loop.steps", "40", "--brake.stop", "judge"])
    assert run.brake == Brake(stop="judge") and run.loop.steps == 40
    assert run_of(["dp2o", "--loop.steps", "40"]).brake is None

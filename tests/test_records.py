"What a run's record stands for: other contents behind the same names are refused, what changes nothing is not"
import json
import shutil
from dataclasses import replace

import pytest
from test_align import FEW

import srnb.align
from srnb.align import SFT, Run, Start, Work, claim
from srnb.backbones import BackboneOptions, write_tiny
from srnb.core import RunOccupied, open_run
from srnb.data import embedded_photos
from srnb.nets import UNetConfig
from srnb.onestep import BaseRun, train_base
from srnb.policies import save_pretrained
from srnb.runs import Base, Data, Judging, check_unseen, claimed, inputs_of, is_done, policy_of, prompts_of, record_of
from srnb.training import processes


@pytest.fixture(scope="module")
def sd(tmp_path_factory): return write_tiny("sd", tmp_path_factory.mktemp("records")/"sd")


@pytest.fixture
def photos(tmp_path):
    "A folder of two photographs, and how the first becomes another picture under its old name"
    folder, found = tmp_path/"photos", embedded_photos("train")
    folder.mkdir()
    for p in found[:2]: shutil.copy(p.path, folder/p.path.name)
    return folder, lambda: shutil.copy(found[2].path, folder/found[0].path.name)


def run_on(folder, out, tiny, **more):
    data = Data(photos=(str(folder),), held_out=more.pop("held_out", ()), size=64, places=1)
    more = dict(judging=Judging(None, judges=("psnr_y",)), loop=FEW, batch=1, patch=32) | more
    return Run(str(out), SFT, data, Base(str(tiny), precision="no", sample_steps=1), **more)


def held(folder):
    folder.mkdir(exist_ok=True)
    for p in embedded_photos("held_out")[:2]: shutil.copy(p.path, folder/p.path.name)
    return str(folder)


def test_a_run_knows_its_photographs(tiny, photos, tmp_path):
    folder, change = photos
    run = run_on(folder, tmp_path/"out", tiny, held_out=(held(tmp_path/"held"),))
    claim(run, processes())
    claim(run, processes()) # the same once more
    change()
    with pytest.raises(RunOccupied, match="stands_for.inputs"): claim(run, processes())


def test_a_shared_stage_knows_its_pictures_and_prompts(tiny, photos, tmp_path, monkeypatch):
    folder, change = photos
    notes, run = [], run_on(folder, tmp_path/"out", tiny, held_out=(held(tmp_path/"held"),))
    monkeypatch.setattr(srnb.align, "train_adapter", lambda *a: notes.append(a[-1]) or tmp_path)
    monkeypatch.setattr(Work, "renew", lambda self: None)
    file, policy = tmp_path/"prompts.json", policy_of(run.base)
    def stage(run):
        Start().prepare(Work(run, policy, *inputs_of(run.data, policy, None)))
        return json.dumps(notes[-1])
    first = stage(run)
    assert stage(run) == first
    ids = [p.id for o in (folder, tmp_path/"held") for p in srnb.runs.find_photos(o)]
    file.write_text(json.dumps(dict.fromkeys(ids, "a tree")))
    told = replace(run, data=replace(run.data, prompts=str(file)))
    with_prompts = stage(told)
    file.write_text(json.dumps(dict.fromkeys(ids, "a house")))
    others = stage(told)
    change()
    assert len({first, with_prompts, others, stage(run)}) == 4


def base_run(folder, out, **more):
    how = dict(patch=64, batch=1, versions=1, max_side=160, precision="no", loop=replace(FEW, steps=1))
    return BaseRun(str(out), (str(folder),), **how, **more)


def test_a_base_knows_its_photographs(photos, tmp_path):
    folder, change = photos
    run = base_run(folder, tmp_path/"out", net=UNetConfig((16, 16), (1, 1), 16))
    train_base(run)
    train_base(run) # is done
    change()
    with pytest.raises(RunOccupied, match="stands_for.trained_on"): train_base(run)


def test_a_branch_knows_its_photographs_and_prompts(sd, photos, tmp_path, capsys):
    "And says at the end what it has learnt to read"
    folder, change = photos
    file, ids = tmp_path/"prompts.json", [p.id for p in srnb.runs.find_photos(folder)]
    file.write_text(json.dumps(dict.fromkeys(ids, "a tree")))
    run = base_run(folder, tmp_path/"out", init=str(sd), prompts=str(file))
    run = replace(run, loop=replace(run.loop, lr=1e-12))
    train_base(run)
    said = capsys.readouterr().out
    assert "influence of the input: " in said
    assert "WARNING: this branch does not read its input yet: train longer, or lower loop.warmup" in said
    faster = replace(run, loop=replace(run.loop, log_with="none"), options=replace(run.options, checkpointing=True))
    train_base(faster) # is done: nothing of it changes the result
    file.write_text(json.dumps(dict.fromkeys(ids, "a house")))
    with pytest.raises(RunOccupied, match="stands_for.trained_on"): train_base(run)
    file.write_text(json.dumps(dict.fromkeys(ids, "a tree")))
    change()
    with pytest.raises(RunOccupied, match="stands_for.trained_on"): train_base(run)


def test_prompts_belong_to_photographs(tmp_path):
    "A name may end as a crop's does"
    file = tmp_path/"prompts.json"
    file.write_text(json.dumps({"img": "a tree", "img-1": "a house", "bird": "a bird"}))
    assert prompts_of(str(file), ["img", "img-1"]) == {"img": "a tree", "img-1": "a house"}
    with pytest.raises(ValueError, match="none for the photograph bird-lamp .*name without its ending.*held-out"):
        prompts_of(str(file), ["bird", "bird-lamp"])


def test_a_crop_has_the_prompt_of_its_photograph(tiny, tmp_path):
    file, folder = tmp_path/"prompts.json", tmp_path/"photos"
    folder.mkdir()
    a, b = embedded_photos("train")[:2]
    for p, name in ((a, "img"), (b, "img-1")): shutil.copy(p.path, (folder/name).with_suffix(p.path.suffix))
    probes = [p.id for p in embedded_photos("held_out")]
    file.write_text(json.dumps({"img": "a tree", "img-1": "a house"} | dict.fromkeys(probes, "")))
    run = run_on(folder, tmp_path/"out", tiny)
    held_out = (held(tmp_path/"held"),)
    run = replace(run, data=replace(run.data, prompts=str(file), places=2, held_out=held_out))
    policy = policy_of(run.base)
    work = Work(run, policy, *inputs_of(run.data, policy, None))
    told = {o.id: o.prompt for o in work.crops.held}
    assert told == {"img-0": "a tree", "img-1": "a tree", "img-1-0": "a house", "img-1-1": "a house"}


def test_prompts_of_both_sets_are_checked_before_the_base_is_read(tiny, photos, tmp_path, monkeypatch):
    file = tmp_path/"prompts.json"
    file.write_text(json.dumps({p.id: "" for p in srnb.runs.find_photos(photos[0])})) # none of those held out
    run = run_on(photos[0], tmp_path/"out", tiny, held_out=(held(tmp_path/"held"),))
    monkeypatch.setattr(srnb.align, "policy_of", lambda *a: pytest.fail("the base was read"))
    with pytest.raises(ValueError, match="prompts: .*none for the photograph"):
        claim(replace(run, data=replace(run.data, prompts=str(file))), processes())


def test_what_changes_no_result_does_not_bar_a_folder(tiny, photos, tmp_path):
    "The remedies for a full card, trackers, and pictures that are shown; the record keeps what was said first"
    run = run_on(photos[0], tmp_path/"out", tiny, rows=1)
    open_run(tmp_path/"out", record_of(run))
    open_run(tmp_path/"stage", dict(loop=dict(steps=2, log_with="none")))
    base = replace(run.base, sample_batch=1, options=BackboneOptions(checkpointing=True, offload_vae=True))
    loop = replace(run.loop, log_with="none")
    other = replace(run, base=base, loop=loop, judging=replace(run.judging, show=2))
    assert record_of(other) != record_of(run) and not is_done(tmp_path/"out", record_of(other))
    with claimed(tmp_path/"stage", dict(loop=dict(steps=2, log_with="tensorboard"))): pass
    with pytest.raises(RunOccupied, match="config.rows"): is_done(tmp_path/"out", record_of(replace(other, rows=0)))


@pytest.mark.parametrize("made, message", [
    (lambda sd: Run("out", base=Base(str(sd), options=BackboneOptions(train="whole")), rank=4), "Run.rank = 4 .*whole"),
    (lambda sd: BaseRun("out", init=str(sd), rank=4), "BaseRun.rank = 4 .*whole"),
    (lambda sd: BaseRun("out", init=str(sd), prompt_dropout=.5), "BaseRun.prompt_dropout = 0.5 .*prompts")])
def test_what_would_change_nothing_is_refused(sd, made, message):
    with pytest.raises(ValueError, match=message): made(sd)


def test_the_branch_that_has_seen_a_photograph_is_named(sd, tiny, tmp_path):
    photo, end = embedded_photos("held_out")[0], r"give photographs that it has not seen: held_out \(--data.held-out\)"
    folder, branch = save_pretrained(policy_of(Base(str(tiny))), tmp_path/"small"), tmp_path/"branch"
    branch.mkdir()
    for o in (folder, branch): (o/"photos.json").write_text(json.dumps([photo.sha256]))
    policy = policy_of(Base(str(sd)))
    policy.source = branch
    with pytest.raises(ValueError, match=f"training of options.control = {branch}; {end}"):
        check_unseen(str(sd), [photo], policy)
    with pytest.raises(ValueError, match=f"training of {folder}; {end}"): check_unseen(str(folder), [photo])

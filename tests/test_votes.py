"Votes: files of every form and every fault, strengths of raters whose taste is known, and the whole evening"
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import same_result

import srnb.votes as v
from srnb.align import Preferred, Voted
from srnb.command import main
from srnb.config import fill
from srnb.core import bicubic, check_close, generator, read_image, read_run, write_image
from srnb.curation import Group
from srnb.data import crop, embedded_photos
from srnb.look import write_ranking
from srnb.pairs import Pairs, check_pairs
from srnb.runs import record_of
from srnb.train import presets, train
from srnb.training import latest_checkpoint

HEAD = "image,winner,loser,rater,tie\n"


@pytest.fixture
def night(tmp_path):
    "Two inputs and three candidates of each; the folder, and the key of a page"
    g = generator(0)
    for i in ("one", "two"):
        for name, side in (("lq", 8), ("candidates/x", 32), ("candidates/y", 32), ("candidates/z", 32)):
            write_image(tmp_path/"n"/name/f"{i}.png", torch.rand(3, side, side, generator=g))
    _, key = write_ranking({n: tmp_path/"n/candidates"/n for n in "xyz"}, tmp_path/"n/page.html", tmp_path/"n/lq")
    return tmp_path/"n", key


def rows(votes): return sorted(map(tuple, votes[["image", "winner", "loser", "rater"]].to_numpy().tolist()))


def ranked(folder, key, who, order, **other):
    "A file of answers, the same order on every picture"
    said = v.read_key(key)
    answers = {i: sorted(o["methods"], key=lambda a: order.index(o["methods"][a]))[:said["places"]]
               for i, o in said["images"].items()}
    path = folder/f"answers-{who}.json"
    path.write_text(json.dumps(dict(study=said["study"], participant=who, answers=answers) | other))
    return path


# ---------------------------------------------------------------- reading

def test_a_ranking_a_table_and_two_folders_say_the_same(night, tmp_path):
    folder, key = night
    ranked(folder, key, "Ada", "xzy")
    votes = v.read_votes(folder)
    expected = sorted((i, a, b, "Ada") for i in ("one", "two") for a, b in ("xz", "xy", "zy"))
    assert rows(votes) == expected and set(votes["where"]) == {"answers-Ada.json, image 1", "answers-Ada.json, image 2"}
    (tmp_path/"t").mkdir()
    (tmp_path/"t/a.csv").write_text("\ufeffImage, Winner,loser,rater\n" + "\n".join(",".join(o) for o in expected))
    assert rows(v.read_votes(tmp_path/"t")) == expected
    for name, of in (("preferred", "x"), ("unpreferred", "y")):
        for i in ("one", "two"):
            write_image(tmp_path/"f"/name/f"{i}.png", read_image(folder/"candidates"/of/f"{i}.png"))
    assert rows(v.read_votes(tmp_path/"f")) == [(i, "preferred", "unpreferred", "folders") for i in ("one", "two")]


def test_places_that_were_not_given_lose_to_those_that_were_and_not_to_each_other(night):
    folder, _ = night
    (folder/"page.key.json").unlink()
    _, key = write_ranking({n: folder/"candidates"/n for n in "xyz"}, folder/"top.html", top=1)
    ranked(folder, key, "Ada", "yxz")
    assert rows(v.read_votes(folder)) == sorted((i, "y", o, "Ada") for i in ("one", "two") for o in "xz")


@pytest.mark.parametrize("text, said", [
    (HEAD+"one,x,y,A,\none,y,x,A,\n", "v.csv, line 3: contradicts v.csv, line 2, where A has compared"),
    (HEAD+"one,x,y,A,\none,x,y,A,\n", "v.csv, line 3: repeats v.csv, line 2"),
    (HEAD+"one,x,y,A,\none,x,y,A,1\n", "v.csv, line 3: contradicts v.csv, line 2"),
    (HEAD+"one,x,y,,\n", "v.csv, line 2: rater is empty"), (HEAD+"one,,y,A,\n", "v.csv, line 2: winner is empty"),
    (HEAD+"one,x,x,A,\n", "v.csv, line 2: x is compared with itself"), (HEAD+"one,x,y,A,2\n", "tie must be 1"),
    (HEAD+"one,x,y\n", "v.csv, line 2: 3 cells under a header of 5"),
    ("one,x,y\n", "v.csv, line 1: the header must name"),
    ("image;winner;loser\n", "with commas between"), ("image,winner,loser,mood\n", "line 1: the header"),
    ("", "got nothing"), (HEAD, "holds no votes"), (HEAD+'one,"x,y,A,\n', "not a table of text")])
def test_what_is_wrong_with_a_table_is_named(tmp_path, text, said):
    (tmp_path/"v.csv").write_text(text)
    with pytest.raises(ValueError, match=said): v.read_votes(tmp_path)


def test_everything_that_is_wrong_is_named_at_once(night):
    folder, key = night
    (folder/"a.csv").write_text(HEAD+"one,x,y,A\ntwo,x,x,A,\n")
    (folder/"half.json").write_text('{"study": ')
    (folder/"other.json").write_text('{"study": "abc", "answers": {}}')
    (folder/"list.json").write_text("[]")
    (folder/"notes.txt").write_text("B was nice")
    ranked(folder, key, "Ada", "xyz", answers={"1": ["A", "B", "C"]})
    ranked(folder, key, "Ben", "xyz", participant="Eva")
    ranked(folder, key, "Eva", "xyz")
    with pytest.raises(ValueError) as e: v.read_votes(folder)
    for said in ("8 things among the votes cannot be used, so none is", "a.csv, line 2: 4 cells", "a.csv, line 3: x is",
                 "half.json: damaged JSON", "other.json: answers of study abc, whose .key.json is not here",
                 "list.json: not the answers", "notes.txt: no votes are read from it",
                 "answers-Ada.json: incomplete, 1", "answers-Eva.json and answers-Ben.json are both of rater 'Eva'"):
        assert said in str(e.value), said


def test_bytes_that_are_no_text_and_folders_without_partner(tmp_path):
    (tmp_path/"v.csv").write_bytes(b"\xff\xfe\x00")
    write_image(tmp_path/"preferred/one.png", torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="v.csv: not a table.*there is no folder unpreferred"): v.read_votes(tmp_path)
    write_image(tmp_path/"unpreferred/two.png", torch.zeros(3, 8, 8))
    (tmp_path/"v.csv").unlink()
    said = "preferred/one.png: unpreferred has no.*unpreferred/two.png: preferred has no"
    with pytest.raises(ValueError, match=said):
        v.read_votes(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder of votes"): v.read_votes(tmp_path/"none")


def test_every_vote_on_a_picture_that_is_not_there_is_named(night):
    folder, _ = night
    (folder/"v.csv").write_text("image,winner,loser\none,x,w\nthree,x,y\n")
    said = "v.csv, line 2: candidates has no folder 'w'.*line 3: lq has no picture 'three'"
    with pytest.raises(ValueError, match=said):
        v.voted_pairs(folder)
    (folder/"v.csv").write_text("image,winner,loser\none,x,../x\n") # a name is not a path
    with pytest.raises(ValueError, match="no folder '../x'"): v.voted_pairs(folder)
    (folder/"lq").rename(folder.with_name("away"))
    with pytest.raises(ValueError, match="there is no folder lq"): v.vote_photos(folder)


# ---------------------------------------------------------------- strengths

def table(*votes): return pd.DataFrame([(*o, "") for o in votes], columns=["image", "winner", "loser", "rater", "tie",
                                                                          "where"])


def test_thirty_to_ten_is_ln_3_and_a_tie_is_half_a_vote_for_each():
    wins = np.array([[0., 30.], [10., 0.]])
    theta = v.fit_strengths(wins)
    check_close(theta[0]-theta[1], math.log(3), atol=1e-10)
    c = np.array([1., -1.])
    check_close((c @ np.linalg.pinv(v.bt_information(theta, wins)) @ c)**.5, .36514837, atol=1e-8)
    votes = [(str(k), *("ab" if k < 25 else "ba"), "r", False) for k in range(30)]
    ties = [(str(k), "b", "a", "r", True) for k in range(30, 40)]
    t = v.strengths(table(*votes, *ties), "b", 50)
    check_close(t.strength[0], math.log(3), atol=1e-10)
    assert t.name.tolist() == ["a", "b"] and t.wins.tolist() == [30, 10] and not t.attrs["prior"]
    assert len(v.agreement(table(*ties))) == 0


def test_the_interval_counts_pictures_and_not_votes():
    "Copies inside a picture change nothing; without pictures that differ there is no interval"
    votes = [(str(k), *("ab" if k % 3 else "ba"), "r", False) for k in range(24)]
    once = v.strengths(table(*votes), "b", 300)
    copied = v.strengths(table(*((*o[:3], f"r{k}", False) for o in votes for k in range(5))), "b", 300)
    counts = v.win_counts(table(*votes), ["a", "b"])
    check_close(v.fit_strengths(v.redrawn(counts, 300)), v.fit_strengths(v.redrawn(5*counts, 300)), atol=1e-9)
    width = (copied.high-copied.low)[0]/(once.high-once.low)[0] # five raters who always agree
    assert .8 < width < 1.3
    assert once.attrs == dict(images=24, raters=1, prior=False, prior_share=pytest.approx(0., abs=.02))


def test_one_model_that_never_lost_needs_a_prior_and_says_so():
    t = v.strengths(table(("1", "a", "b", "r", False), ("2", "a", "b", "r", False)), "b", 20)
    assert t.attrs["prior"] and t.attrs["prior_share"] == 1. and 0 < t.strength[0] < 4


def test_samples_of_one_model_are_not_compared_as_models():
    t = v.between_models(table(("1", "a@0", "a@1", "r", False), ("1", "a@1", "b", "r", False)))
    assert t[["winner", "loser"]].to_numpy().tolist() == [["a", "b"]]


def test_agreement_by_hand():
    said = dict(p="ab ab ab ab", q="ab ab ab ba", r="ba ba ba ba")
    votes = [(str(k), *pair, who, False) for who, o in said.items() for k, pair in enumerate(o.split())]
    t = v.agreement(table(*votes)).set_index(["rater", "other"])
    assert t.share.to_dict() == {("p", "q"): .75, ("p", "r"): 0., ("q", "r"): .25} and (t.compared == 4).all()


def test_weights_are_votes_of_mean_1_and_both_orders_stay(night):
    folder, _ = night
    (folder/"v.csv").write_text(HEAD+"one,x,y,A,\none,x,y,B,\none,y,x,C,\ntwo,z,x,A,1\n")
    pairs = v.voted_pairs(folder)
    check_close(pairs.weight.flatten(), torch.tensor([2., 1., .5, .5]))
    names = [("one", "x", "y"), ("one", "y", "x"), ("two", "x", "z"), ("two", "z", "x")]
    for k, (i, w, l) in enumerate(names):
        for found, of in ((pairs.winners, w), (pairs.losers, l)):
            check_close(found[k][0].double()/255, read_image(folder/"candidates"/of/f"{i}.png").double(), atol=1e-7)
    assert isinstance(pairs, Pairs) and check_pairs(pairs, 4, 32, "votes") is pairs


# ---------------------------------------------------------------- a run

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Folders of small photographs to train on and held out"
    top = tmp_path_factory.mktemp("photos")
    for k, p in enumerate(embedded_photos("train")[:6]):
        write_image(top/("train", "held", "more")[k//2]/f"{p.id}.png", crop(p.read(), (96, 112), 60, 80))
    return top


@pytest.fixture
def run(night, tiny, photos, tmp_path):
    folder, key = night
    ranked(folder, key, "Ada", "xyz")
    few = dict(photos=(str(photos/"train"),), held_out=(str(photos/"held"),), size=64, places=1, backbone=str(tiny),
               precision="no", sample_steps=2, reward=None, judges=("psnr_y",), eval_m=1, rank=2, batch=1, patch=32,
               steps=4, warmup=1, save_every=2, log_every=1, kappa=10., lr=1e-2, folder=str(folder),
               out=str(tmp_path/"run"))
    return fill(presets()["votes"][1], few)


def test_a_run_records_the_votes_and_goes_on_with_them_alone(run, tmp_path, deadly):
    "Killed and resumed it leaves the same; the folder may be moved; another vote is another run"
    import srnb.align
    from srnb.core import RunOccupied
    whole = train(run)
    count, calls, die = deadly
    count(srnb.align, "finish")
    die["finish"] = 0
    cut = fill(run, dict(out=str(tmp_path/"cut")))
    real, loss = srnb.align.draw_loss, []
    def stops(*a, **k):
        made = real(*a, **k)
        def call(step, part):
            if step == 3 and not loss:
                loss.append(step)
                raise KeyboardInterrupt
            return made(step, part)
        return call
    srnb.align.draw_loss = stops
    try:
        with pytest.raises(KeyboardInterrupt): train(cut)
    finally: srnb.align.draw_loss = real
    assert latest_checkpoint(tmp_path/"cut").name.endswith("2")
    moved = tmp_path/"moved"
    (tmp_path/"n").rename(moved)
    cut = fill(cut, dict(folder=str(moved)))
    die.clear()
    same_result(train(cut), whole)
    said = read_run(whole)[0]["params"]
    assert len(said["stands_for"]["pairs"]) == 64 and not (whole/"bank").exists()
    with (moved/"late.csv").open("w") as f: f.write("image,winner,loser\none,z,y\n")
    with pytest.raises(RunOccupied, match="stands_for.pairs"): train(cut)


@pytest.mark.parametrize("change, said", [
    (dict(folder=""), "Voted.folder .--method.losers.folder. is empty"),
    (dict(folder="none"), "no folder of votes at none"),
    (dict(patch=48), "sides of at least patch = 48")])
def test_a_run_without_votes_is_refused_before_any_work(run, idle, change, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said): train(fill(run, change))


def test_a_photograph_that_people_voted_on_is_not_held_out(run, photos, tmp_path, idle):
    folder = tmp_path/"n"
    held = sorted((photos/"held").iterdir())[0]
    small = bicubic(read_image(held)[None], (24, 28))[0]
    write_image(folder/"lq/one.png", small)
    for n in "xyz": write_image(folder/"candidates"/n/"one.png", bicubic(small[None], (96, 112))[0])
    with pytest.raises(ValueError, match=f"one.png .train. looks like '{held.stem}' .held out."): train(run)
    assert not (tmp_path/"run").exists()


def test_a_choice_of_its_own():
    assert record_of(presets()["votes"][1])["config"]["method"]["losers"] == {"is": "Voted", "folder": ""}
    assert Voted.meets == (Preferred,) and Group("a", *[torch.zeros(1)]*3)


# ---------------------------------------------------------------- the evening

SAMPLING = ["--dtype", "float32", "--steps", "2"]


@pytest.mark.slow
def test_the_whole_evening(tiny, photos, tmp_path, monkeypatch, capsys):
    """Inputs are too dark, and so is the base. Two raters prefer what is closer to the photograph, with noise: a page,
    files, strengths, an adapter, and another page of other pictures, where they prefer the adapter to its base"""
    monkeypatch.chdir(tmp_path)
    truth = {}
    for night, places in (("inputs", (0, 1, 2)), ("others", (3, 4, 5))):
        for p in embedded_photos("train")[:3]:
            image = p.read()
            for k in places:
                name, gt = f"{p.id}-{k}.png", .15+.8*crop(image, 48, 100+30*k, 70+35*k)
                truth[name], lq = gt, bicubic(gt[None], (12, 12))
                write_image(f"{night}/{name}", lq[0]-.1)
                if night == "inputs": write_image(f"light/{name}", bicubic(lq, (48, 48))[0])

    def rank(night): # 6 log odds a decibel
        def utility(image, name):
            apart = read_image(f"{night}/candidates/{name}/{image}.png")-truth[f"{image}.png"]
            return -60*apart.square().mean().log10().item()
        for who in ("Ada", "Ben"): v.simulated_rater(f"{night}/page.key.json", who, utility)

    def command(*words):
        code = main([str(o) for o in words])
        out = capsys.readouterr()
        assert code == 0, out.err
        return out.out

    page = ["votes", "page", "monday", f"base={tiny}", "light=light", "--data", "inputs", "--samples", 2, *SAMPLING]
    assert command(*page).strip().endswith("monday/page.html")
    rank("monday")
    said = command("votes", "read", "monday", "--baseline", "base", "--draws", 200)
    assert "54 votes (0 ties) of 2 raters on 9 pictures" in said and "18 are between samples of one model" in said
    assert "through a prior alone" in said # nobody liked the base
    command("train", "votes", "--method.losers.folder", "monday", "--out", "run", "--base.backbone", tiny,
            "--base.precision", "no", "--base.sample-steps", 2, "--judging.reward", "None", "--judging.eval-m", 1,
            "--judging.judges", "psnr_y", "--data.photos", photos/"more", "--data.held-out", photos/"held",
            "--data.size", 64, "--data.places", 1, "--rank", 8, "--batch", 8, "--patch", 32, "--method.link.kappa", 40,
            "--method.safeguard", "--loop.steps", 80, "--loop.lr", 1e-2, "--loop.warmup", 2, "--loop.decay", .5)
    command("votes", "page", "tuesday", f"base={tiny}", "new=run", "--data", "others", "--samples", 2, *SAMPLING)
    rank("tuesday")
    said = command("votes", "read", "tuesday", "--baseline", "base")
    t = v.strengths(v.between_models(v.read_votes("tuesday")), "base").set_index("name")
    share = t.wins["new"]/t.votes["new"]
    print(said, f"held-out share {share:.3f}")
    assert share > .7 and t.low["new"] > 0


def test_a_copied_file_is_no_second_rater(tmp_path):
    for name in ("ada.csv", "ada (1).csv"): (tmp_path/name).write_text("image,winner,loser\n1,a,b\n")
    with pytest.raises(ValueError, match=r"ada.csv: the same bytes as ada \(1\).csv; take one away"):
        v.read_votes(tmp_path)
    (tmp_path/"ada (1).csv").unlink()
    assert len(v.read_votes(tmp_path)) == 1
    (tmp_path/"x.csv").mkdir()
    with pytest.raises(ValueError, match="x.csv: no votes are read from it"): v.read_votes(tmp_path)


@pytest.mark.parametrize("key", [
    dict(images={}), dict(images=[]), dict(study=["a"]), dict(images={"1": dict(image="p")}),
    dict(images={"1": dict(image="p", methods=["a"])})])
def test_a_key_of_another_form_is_named(tmp_path, key):
    whole = dict(study="s", places=2, seed=0, images={"1": dict(image="p", methods=dict(A="a", B="b"))})
    (tmp_path/"page.key.json").write_text(json.dumps(whole | key))
    with pytest.raises(ValueError, match="page.key.json: not the key of a study"): v.read_votes(tmp_path)


def test_two_keys_of_one_study_are_refused(tmp_path):
    for name, method in (("a", "small"), ("b", "large")):
        images = {"1": dict(image="p", methods=dict(A=method, B="bicubic"))}
        (tmp_path/f"{name}.key.json").write_text(json.dumps(dict(study="s", places=2, seed=0, images=images)))
    with pytest.raises(ValueError, match="b.key.json and a.key.json are keys of one study"): v.read_votes(tmp_path)

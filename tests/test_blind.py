"Pictures without ground truth, judged in every run: by whom, what is left as it was, bad folders, resumption"
import json
import shutil
from dataclasses import replace

import forks
import nbformat
import pytest
import torch
from conftest import same_result
from PIL import Image
from test_multi import team

from srnb import plan
from srnb.align import SFT, Run, align
from srnb.backbones import BackboneOptions, load_backbone, write_tiny, write_tiny_control
from srnb.config import record
from srnb.core import RunOccupied, bicubic, read_blind, read_run, to_pil
from srnb.curation import finished_groups, group_seeds, read_group, score_bank
from srnb.data import embedded_photos, find_photos, trim
from srnb.metrics import summarise
from srnb.nets import OneStepConfig
from srnb.onestep import BaseRun, CTMSRRun, evaluate_base, train_ctmsr
from srnb.policies import Policy, from_pretrained, load_adapter, save_pretrained
from srnb.release import export_dataset
from srnb.rewards import PIQE, PSNR_Y, Metric, score_group
from srnb.runs import Base, Data, Judging
from srnb.train import from_json, run_of, train
from srnb.training import Loop

FEW = Loop(steps=2, lr=1e-2, warmup=1, save_every=2, log_every=1)
M = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Two photographs to train on, two held out, and low-quality pictures of several sizes and kinds"
    top, photos = tmp_path_factory.mktemp("folders"), embedded_photos("train")
    for k, name in enumerate(("train", "held")):
        (top/name).mkdir()
        for p in photos[2*k:2*k+2]: to_pil(p.read()[:, 60:156, 80:192].contiguous()).save(top/name/f"{p.id}.png")
    (top/"blind"/"deeper").mkdir(parents=True)
    sizes = zip(photos[4:7], (30, 21, 24), (23, 40, 24), strict=True)
    a, b, c = (to_pil(p.read()[:, :o, :q].contiguous()) for p, o, q in sizes)
    a.save(top/"blind"/"colour.png")
    b.convert("L").save(top/"blind"/"grey.jpg", quality=90)
    c.convert("P", palette=Image.Palette.ADAPTIVE).save(top/"blind"/"deeper"/"palette.bmp")
    return top


@pytest.fixture(scope="module")
def run(folders, tiny):
    "A small run that ranks by PIQE, without such pictures"
    data = Data((str(folders/"train"),), (str(folders/"held"),), size=64, places=1)
    return Run("", SFT, data, Base(str(tiny), precision="no", sample_steps=2),
               Judging("offline_nr", judges=("psnr_y", "ssim_y"), eval_m=M), FEW, rank=2, batch=1, patch=32)


def blind(run, folder, **change):
    return replace(run, judging=replace(run.judging, blind=str(folder)), **change)


@pytest.fixture(scope="module")
def done(run, folders, tmp_path_factory):
    "The run with such pictures and a matched copy"
    out = tmp_path_factory.mktemp("done")/"run"
    more = dict(drift=1e-9, loop=replace(FEW, keep_every=1), out=str(out))
    return align(blind(run, folders/"blind", **more)), replace(run, **more)


def test_every_picture_is_judged_with_m_samples_of_every_variant(done, folders, tiny):
    "By hand: whole pictures, cut to the stride alone, the seeds of their names, the policies before and after, bicubic"
    out, table = done[0], read_blind(done[0])
    ids = ["colour", "deeper_palette", "grey"]
    assert list(table) == ["image", "seed", "metric", "variant", "value"] and set(table.image) == set(ids)
    counts = table[table.metric == "piqe"].groupby(["image", "variant"]).seed.agg(["count", "nunique"])
    for (_, variant), n in counts.iterrows(): assert n.tolist() == [1 if variant == "bicubic" else M]*2
    assert len(counts) == 3*4 and set(table.metric) == {"piqe", "reward", "moved", "spread"}
    base = from_pretrained(tiny)
    for photo in find_photos(folders/"blind"):
        lq = trim(photo.read(), base.stride//base.codec.factor)
        assert max(a-b for a, b in zip(photo.read().shape, lq.shape, strict=True)) < base.stride//base.codec.factor
        for variant, adapter in (("before", None), ("after", "adapter"), ("matched", "matched-adapter")):
            policy = load_adapter(from_pretrained(tiny), out/adapter) if adapter else base
            sr = policy.sample(lq[None], group_seeds(photo.id, M), 2)[0]
            assert len({o.numpy().tobytes() for o in sr}) == M # samples of their own
            group = read_group(out/f"blind-{variant}", photo.id)
            assert torch.equal(group.sr, sr) and torch.equal(group.lq, lq) and group.gt is None
            rows = table[(table.image == photo.id) & (table.variant == variant) & (table.metric == "piqe")]
            assert rows.sort_values("seed").value.tolist() == score_group([PIQE], sr)["piqe"].tolist()
        y = bicubic(lq[None], [4*o for o in lq.shape[1:]])
        row = table[(table.image == photo.id) & (table.variant == "bicubic") & (table.metric == "piqe")]
        assert row.value.tolist() == score_group([PIQE], y)["piqe"].tolist()


def test_mean_and_paired_interval_are_by_picture(done):
    table = summarise(read_blind(done[0])).set_index(["metric", "variant"])
    row = table.loc["piqe", "after - before"]
    assert (row.photographs, row.seeds) == (3, M) and row.low <= row["mean"] <= row.high


def test_nothing_else_of_a_run_changes(done, tmp_path):
    "The same run without such pictures leaves the same metrics, bounds, banks, log and adapters"
    out, run = done
    other = align(replace(run, out=str(tmp_path/"without")))
    same_result(out, other)
    files = {o.relative_to(other) for o in other.rglob("*") if o.is_file() and o.suffix in (".parquet", ".safetensors")}
    files = {o for o in files if not any(p.startswith("checkpoint") for p in o.parts)} | {(other/"bounds.json").name}
    assert {"metrics.parquet", "psd.parquet", "bounds.json"} <= {str(o) for o in files} and len(files) > 15
    for o in files: assert (out/o).read_bytes() == (other/o).read_bytes(), o
    more = {o.name for o in out.iterdir()}-{o.name for o in other.iterdir()}
    assert more == {"blind.parquet", "blind-before", "blind-after", "blind-matched"}
    with pytest.raises(FileNotFoundError, match="was not asked to judge pictures without ground truth"):
        read_blind(other)


def test_the_record_says_what_was_judged_by_whom_and_not_where(done, folders, tmp_path):
    "Contents, not paths: the folder may move; another picture, or a name, is another run"
    out, run = done
    said = read_run(out)[0]["params"]["stands_for"]["blind"]
    assert said["judged_by"] == ["piqe"] and said["left_alone"] == ["psnr_y", "ssim_y"] and said["images"] == 3
    moved = shutil.copytree(folders/"blind", tmp_path/"moved")
    assert align(blind(run, moved)) == out # it is done
    (moved/"grey.jpg").rename(moved/"gray.jpg")
    with pytest.raises(RunOccupied, match="stands_for.blind.pictures"): align(blind(run, moved))
    (moved/"gray.jpg").rename(moved/"grey.jpg")
    Image.open(moved/"grey.jpg").save(moved/"grey.jpg", quality=50)
    with pytest.raises(RunOccupied, match="stands_for.blind.pictures"): align(blind(run, moved))
    with pytest.raises(RunOccupied, match="stands_for.blind"): align(run)


def test_killed_and_resumed_picture_by_picture(run, folders, tmp_path, deadly):
    count, calls, die = deadly
    count(Policy, "sample")
    run = blind(run, folders/"blind")
    a, b = tmp_path/"a", tmp_path/"b"
    align(replace(run, out=str(a)))
    whole = calls["sample"]
    assert whole == 2+3+2+3 # held out and these, before and after
    for n in (3, 4, None): # the second picture before; then the second after
        calls["sample"], die["sample"] = 0, n
        if n: pytest.raises(KeyboardInterrupt, align, replace(run, out=str(b)))
        else: align(replace(run, out=str(b)))
    assert 3+4+calls["sample"] == whole
    same_result(b, a)
    assert read_blind(b).equals(read_blind(a))
    stamps = {o: o.stat().st_mtime_ns for o in b.rglob("*.safetensors")}
    (b/"blind.parquet").unlink()
    (b/"metrics.parquet").unlink()
    align(replace(run, out=str(b)))
    assert read_blind(b).equals(read_blind(a)) and calls["sample"] == whole-7
    assert all(o.stat().st_mtime_ns == t for o, t in stamps.items() if "blind" in str(o))


def test_two_runs_share_what_is_before(run, folders, tmp_path, drawn):
    "And with other pictures they do not"
    home = str(tmp_path/"home")
    run = blind(run, folders/"blind", banks=home)
    align(replace(run, out=str(tmp_path/"a")))
    n = len(drawn)
    align(replace(run, out=str(tmp_path/"b"), seed=1))
    assert len(drawn)-n == n-2-3 # those before are there
    fewer = shutil.copytree(folders/"blind", tmp_path/"fewer")
    (fewer/"colour.png").unlink()
    out = align(blind(replace(run, out=str(tmp_path/"c")), fewer))
    assert set(read_blind(out).image) == {"deeper_palette", "grey"}


# ---------------------------------------------------------------- what is refused, before any work

def refused(run, message, kind=ValueError, at=align):
    with pytest.raises(kind, match=message) as e: at(run() if callable(run) else run)
    assert "\n" not in str(e.value)


def test_folders_that_cannot_be_judged(run, folders, tmp_path, idle):
    "Missing, empty, one picture, pairs, a broken file"
    def named(folder): return lambda: blind(run, folder, out=str(tmp_path/"out"))
    refused(named(tmp_path/"nowhere"), "Judging.blind: no folder at", FileNotFoundError)
    (tmp_path/"empty").mkdir()
    refused(named(tmp_path/"empty"), "Judging.blind: .*empty holds no image")
    for name in ("lq", "gt"): shutil.copytree(folders/"blind", tmp_path/"pairs"/name)
    for name in ("pairs", "pairs/lq"):
        refused(named(tmp_path/name), "Judging.blind: .*ground truth.*pairs/gt.*held_out")
    (tmp_path/"one").mkdir()
    shutil.copy(folders/"blind"/"colour.png", tmp_path/"one")
    refused(named(tmp_path/"one"), "Judging.blind: .*one holds 1 picture.*at least 2")
    (tmp_path/"one"/"broken.png").write_bytes((folders/"blind"/"colour.png").read_bytes()[:200])
    refused(named(tmp_path/"one"), "broken.png")
    to_pil(torch.rand(3, 1, 40)).save(tmp_path/"one"/"broken.png")
    refused(named(tmp_path/"one"), "broken.png.*1×40.*smaller than 2")
    assert not (tmp_path/"out").exists()


def test_no_metric_can_judge_them(folders):
    with pytest.raises(ValueError, match="no-reference metric.*psnr_y.*piqe, niqe, musiq"):
        Judging(None, judges=("psnr_y",), blind=str(folders/"blind"))
    with pytest.raises(ValueError, match="CTMSRRun.blind: .*no-reference metric"):
        CTMSRRun("x", judges=("psnr_y",), blind=str(folders/"blind"))
    Judging(None, judges=("psnr_y", "piqe"), blind=str(folders/"blind"))


def test_pictures_that_the_run_or_its_base_has_seen(run, folders, tiny, tmp_path, idle):
    "By bytes, and for the run's own photographs by look as well"
    photo = find_photos(folders/"train")[0]
    seen = shutil.copytree(folders/"blind", tmp_path/"seen")
    shutil.copy(photo.path, seen/"copy.png")
    refused(blind(run, seen, out=str(tmp_path/"out")), "same file as 'copy' .Judging.blind.")
    Image.open(photo.path).resize((28, 24), Image.Resampling.BOX).save(seen/"copy.png")
    refused(blind(run, seen, out=str(tmp_path/"out")), "looks like 'copy' .Judging.blind.")
    base = shutil.copytree(tiny, tmp_path/"base")
    other = find_photos(folders/"blind")[0]
    (base/"photos.json").write_text(json.dumps([other.sha256]))
    run = blind(run, folders/"blind", base=replace(run.base, backbone=str(base)), out=str(tmp_path/"out"))
    refused(run, f"{other.path.name} was in the training of .*base.*blind")


def test_too_large_for_memory(run, folders, tmp_path, idle, monkeypatch):
    "Told with the file, its size and what it needs"
    large = shutil.copytree(folders/"blind", tmp_path/"large")
    Image.effect_noise((900, 800), 50).save(large/"wide.png")
    monkeypatch.setattr(plan, "free_memory", lambda: 10**9)
    refused(blind(run, large, out=str(tmp_path/"out")), "wide.png has 900×800 pixels.*M = 3.*GB", MemoryError)
    monkeypatch.setattr(plan, "free_memory", lambda: 10**12)
    def went_on(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(Policy, "sample", went_on)
    with pytest.raises(KeyboardInterrupt): align(blind(run, large, out=str(tmp_path/"fits")))


def test_a_metric_that_cannot_score_their_size(run, folders, tmp_path, idle):
    def build():
        def scorer(sr, gt):
            if min(sr.shape[-2:]) < 64: raise ValueError("too small")
            return sr.mean((1, 2, 3)).double()
        return scorer
    picky = Metric("picky", "nr", True, build)
    few = shutil.copytree(folders/"blind", tmp_path/"few")
    to_pil(torch.rand(3, 12, 40)).save(few/"low.png")
    run = replace(run, judging=Judging(None, judges=(PSNR_Y, picky), eval_m=M))
    refused(blind(run, few, out=str(tmp_path/"out")), "low.png.*picky cannot score images of .48, 160.")


# ---------------------------------------------------------------- every way to name it, every kind of run

def test_it_can_be_named_everywhere(folders):
    "In JSON, flat as papermill gives it, on the command line, and read back from a record"
    there = str(folders/"blind")
    runs = [from_json(dict(preset="dp2o", blind=there)), from_json(dict(preset="dp2o", judging=dict(blind=there))),
            run_of(["dp2o", "--judging.blind", there]), from_json(dict(preset="ctmsr", blind=there)),
            run_of(["ctmsr", "--blind", there])]
    for o in runs:
        assert getattr(o, "judging", o).blind == there
        assert from_json(json.loads(json.dumps(dict(run=type(o).__name__, config=record(o))))).out # read again
    assert run_of(["dp2o"]).judging.blind is None and not hasattr(BaseRun("x"), "blind")


def test_a_one_step_run_and_a_base_judge_them_too(folders, tiny, tmp_path):
    there = str(folders/"blind")
    run = CTMSRRun(str(tmp_path/"one"), (str(folders/"train"),), versions=1, max_side=112, patch=32, batch=2,
                   precision="no", net=OneStepConfig((16, 16), (1, 1), 16, 8), held_out=(str(folders/"held"),),
                   window=24, size=64, eval_m=M, judges=("psnr_y", "piqe"), loop=FEW, blind=there)
    run = replace(run, match=replace(run.match, match_loop=FEW))
    out = train_ctmsr(run)
    table, policy = read_blind(out), from_pretrained(out/"policy")
    assert set(table.variant) == {"sr", "bicubic"} and set(table.metric) == {"piqe", "spread"}
    for photo in find_photos(there):
        lq = trim(photo.read(), policy.stride//policy.codec.factor)
        sr = policy.sample(lq[None], group_seeds(photo.id, M), 1)[0]
        rows = table[(table.image == photo.id) & (table.variant == "sr") & (table.metric == "piqe")]
        assert rows.sort_values("seed").value.tolist() == score_group([PIQE], sr)["piqe"].tolist()
    other = train_ctmsr(replace(run, out=str(tmp_path/"without"), blind=None))
    assert (other/"metrics.parquet").read_bytes() == (out/"metrics.parquet").read_bytes()
    assert not (other/"blind.parquet").exists()
    assert train_ctmsr(replace(run, blind=str(shutil.copytree(there, tmp_path/"moved")))) == out
    base = tmp_path/"base"
    save_pretrained(from_pretrained(tiny), base/"policy")
    data = Data((), (str(folders/"held"),), size=64)
    evaluate_base(base, data, m=2, steps=2, blind=there)
    assert set(read_blind(base).variant) == {"sample", "mean", "bicubic"} and set(read_blind(base).image) == {
        "colour", "deeper_palette", "grey"}
    with pytest.raises(ValueError, match="blind: .*pairs"):
        for name in ("lq", "gt"): shutil.copytree(there, tmp_path/"pairs"/name)
        evaluate_base(base, data, m=2, steps=2, blind=str(tmp_path/"pairs"))


@pytest.mark.slow
@pytest.mark.parametrize("name, change", [
    ("dp2o", "after - before"), pytest.param("asasr", "after - before", marks=pytest.mark.repeat),
    pytest.param("dro", "after - before", marks=pytest.mark.repeat),
    pytest.param("sft", "mean - bicubic", marks=pytest.mark.repeat), ("ctmsr", "sr - bicubic")])
def test_papermill_takes_it_and_the_page_shows_it(root, folders, tmp_path, forked, name, change):
    "Smoke runs: the last table with such a change is that of the three pictures"
    page, out, there = root/"nbs"/f"train_{name}.ipynb", tmp_path/"out.ipynb", str(folders/"blind")
    run = forked(forks.notebook, page, out, dict(blind=there), cwd=root, IN_TEST="1")
    assert run.wait() == 0, run.err[-3000:]
    shown = [o for c in nbformat.read(out, 4).cells for o in c.get("outputs", ())]
    shown = [o.data["text/plain"] for o in shown if "data" in o and change in o.data.get("text/plain", "")]
    row = next(o for o in shown[-1].splitlines() if "piqe" in o and change in o)
    assert "3" in row.split(), row # pictures


def test_prompts_are_by_picture(run, folders, tmp_path):
    "One of these pictures needs one as a held-out photograph does, and may not share a name with one"
    pipe = write_tiny("sd", tmp_path/"pipe")
    control = write_tiny_control(load_backbone(pipe), tmp_path/"control")
    base = Base(str(pipe), precision="no", sample_steps=1, options=BackboneOptions(control=str(control)))
    file, there = tmp_path/"prompts.json", shutil.copytree(folders/"blind", tmp_path/"blind")
    photos = [p.id for name in ("train", "held") for p in find_photos(folders/name)]
    told = {i: "a tree" for i in photos} | dict(colour="a wall", grey="", deeper_palette="a roof")
    def ask(**change):
        file.write_text(json.dumps(told | change))
        data = replace(run.data, prompts=str(file))
        judging = Judging(None, judges=("psnr_y", "piqe"), eval_m=1, blind=str(there))
        return replace(run, base=base, data=data, judging=judging, patch=64, out=str(tmp_path/"out"),
                       loop=replace(FEW, steps=1, warmup=1))
    del told["grey"]
    refused(ask(), "prompts: .* has none for the photograph grey")
    told["grey"] = ""
    (there/"grey.jpg").rename(there/f"{photos[0]}.jpg")
    refused(ask(), f"Judging.blind: .*{photos[0]}.jpg has the name of a photograph.*rename")
    (there/f"{photos[0]}.jpg").rename(there/"grey.jpg")
    out = align(ask())
    for variant in ("before", "after"):
        found = {i: read_group(out/f"blind-{variant}", i).prompt for i in finished_groups(out/f"blind-{variant}")}
        assert found == dict(colour="a wall", grey="", deeper_palette="a roof")
    with pytest.raises(RunOccupied, match="stands_for.blind.pictures"): align(ask(colour="a door"))


@pytest.mark.slow
def test_two_processes_judge_them_together(done, run, folders, tmp_path, forked):
    out, run = done
    shared = blind(run, folders/"blind", loop=replace(run.loop, parts=2), out=str(tmp_path/"two"))
    said = dict(run="Run", config=record(shared))
    both = team(forked, train_json, said)
    assert not any(o.wait() for o in both), "".join(o.err for o in both)
    a, b = (read_blind(o).sort_values(["metric", "variant", "image", "seed"]) for o in (out, tmp_path/"two"))
    assert a.drop(columns="value").reset_index(drop=True).equals(b.drop(columns="value").reset_index(drop=True))
    before = a.variant.isin(["before", "bicubic"]).to_numpy()
    assert a.value[before].tolist() == b.value[before].tolist() # the adapter is of more micro-batches
    for variant in ("before", "after", "matched"): assert len(finished_groups(tmp_path/"two"/f"blind-{variant}")) == 3


def train_json(said): train(from_json(said))


def test_a_bank_without_ground_truth_is_not_exported(done, tmp_path):
    with pytest.raises(ValueError, match="colour has no ground truth.*name a bank of photographs"):
        export_dataset(done[0]/"blind-after", tmp_path/"data", "cc0-1.0")
    with pytest.raises(ValueError, match="psnr_y compares with the ground truth"):
        score_bank(done[0]/"blind-after", [PSNR_Y])

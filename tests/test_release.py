"A bank leaves as parquet and comes back as itself; what is damaged or must not leave is refused by name"
import io
import json
import shutil
import struct
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import srnb.curation
import srnb.release
from srnb.core import RunOccupied, check_close, generator, open_run, quantize, to_pil, write_table
from srnb.curation import _fill, bank_reward, finished_groups, make_outputs, read_group, score_bank
from srnb.data import embedded_photos
from srnb.metrics import interval
from srnb.policies import from_pretrained, save_adapter
from srnb.release import export_dataset, import_bank, push, write_card
from srnb.rewards import LSD, PSNR_Y, Metric, Reward

VOTE = Reward("test", fr=(PSNR_Y, LSD))


def photos_of(n, seed=0):
    g = generator(seed)
    def image(h, w): return quantize(torch.rand(3, h, w, generator=g))
    return [(f"photo {k}", image(8+2*k, 10), image(32+8*k, 40)) for k in range(n)]


def candidates(m, seed=1):
    def draw(i, lq):
        g = generator(seed + int(i.split()[1]))
        return quantize(torch.rand(m, 3, 4*lq.shape[1], 4*lq.shape[2], generator=g))
    return draw


PARAMS = dict(policy="0123456789abcdef", m=11, steps=2, sampler="sample_ddim", seed=3, degradation="none")


@pytest.fixture(scope="module")
def bank(tmp_path_factory): # M = 11, photographs of different sizes, prompts
    pairs, top = photos_of(5), tmp_path_factory.mktemp("release")
    prompts = {i: f"a {i}" if k else "" for k, (i, _, _) in enumerate(pairs)}
    folder = _fill(top/"bank", pairs, candidates(11), "groups", PARAMS, prompts)
    score_bank(folder, VOTE.metrics)
    return folder


def silent(*names): # metrics that must not be asked
    def scorer(*a): raise AssertionError("a metric was asked")
    return [Metric(n, "fr", True, lambda: scorer) for n in names]


def data(folder): return sorted((folder/"data").iterdir())


def same_bank(a, b):
    assert finished_groups(a) == finished_groups(b)
    files = [sorted(p.relative_to(o) for p in o.rglob("*") if p.is_file() and p.suffix != ".json") for o in (a, b)]
    assert files[0] == files[1] and len(files[0]) > 5
    for p in files[0]:
        if p.suffix == ".safetensors": assert (a/p).read_bytes() == (b/p).read_bytes()
    x, y = (json.loads((o/"config.json").read_text())["params"] for o in (a, b))
    assert x == y
    assert score_bank(a, silent("psnr_y", "lsd")).equals(score_bank(b, silent("psnr_y", "lsd")))


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_round_trip(bank, tmp_path, groups):
    raw = sum(o.numel() for o in vars(read_group(bank, "photo 0")).values() if isinstance(o, torch.Tensor))
    folder = export_dataset(bank, tmp_path/"a", "cc0-1.0", reward=VOTE, shard_bytes=groups*raw)
    assert len(data(folder)) == -(-5//groups)
    new = import_bank(folder, tmp_path/"new")
    same_bank(bank, new)
    assert read_group(new, "photo 3").prompt == "a photo 3"
    twice = export_dataset(new, tmp_path/"b", "cc0-1.0", reward=VOTE, shard_bytes=groups*raw)
    assert [p.name for p in data(folder)] == [p.name for p in data(twice)]
    assert [p.read_bytes() for p in data(folder)] == [p.read_bytes() for p in data(twice)]
    assert (folder/"README.md").read_bytes() == (twice/"README.md").read_bytes()
    same_bank(bank, import_bank(data(folder), tmp_path/"by files"))
    if groups == 2:
        part = import_bank(data(folder)[1:], tmp_path/"part")
        assert finished_groups(part) == ["photo 2", "photo 3", "photo 4"]


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_reads_it(bank, tmp_path, streaming):
    from datasets import disable_progress_bars, load_dataset
    disable_progress_bars()
    folder = export_dataset(bank, tmp_path/"a", "cc0-1.0", reward=VOTE, shard_bytes=1e5, split="test")
    rows = list(load_dataset(str(folder), split="test", streaming=streaming, cache_dir=str(tmp_path/"cache")))
    assert len(rows) == 5
    for k, row in enumerate(rows):
        group = read_group(bank, f"photo {k}")
        seeds = srnb.curation.group_seeds(group.id, 11, 3)
        assert (row["id"], row["prompt"], row["seeds"]) == (group.id, group.prompt, seeds)
        got = torch.stack([torch.from_numpy(np.array(o)).permute(2, 0, 1) for o in row["sr"]])
        assert torch.equal(got.float()/255, group.sr)
        table = score_bank(bank, VOTE.metrics)
        check_close(row["reward"], bank_reward(table, VOTE, [group.id])[0])
        mine = table[table.group == group.id]
        for n in ("psnr_y", "lsd"): check_close(row["scores"][n], mine[mine.metric == n].value.tolist())


def test_outputs_of_models_have_no_seeds(tmp_path):
    def near(lq): return lq.repeat_interleave(4, 2).repeat_interleave(4, 3)
    bank = make_outputs(tmp_path/"bank", dict(near=near), photos_of(2))
    folder = export_dataset(bank, tmp_path/"a", "other")
    assert pq.read_schema(data(folder)[0]).names == ["id", "prompt", "lq", "gt", "sr"]
    text = (folder/"README.md").read_text()
    for said in ("models `['near']`", "no scores are included", "the degradation was not recorded"): assert said in text
    new = import_bank(folder, tmp_path/"new")
    assert torch.equal(read_group(new, "photo 1").sr, read_group(bank, "photo 1").sr) and not (new/"scores").exists()


def test_whole_shards_stay(bank, tmp_path, deadly):
    count, calls, die = deadly
    raw = 5e4
    whole = export_dataset(bank, tmp_path/"whole", "cc0-1.0", metrics=VOTE.metrics, shard_bytes=raw)
    count(srnb.release, "read_group")
    die["read_group"] = 3 # one look at the first group, then two rows
    with pytest.raises(KeyboardInterrupt):
        export_dataset(bank, tmp_path/"a", "cc0-1.0", metrics=VOTE.metrics, shard_bytes=raw)
    assert len(data(tmp_path/"a")) == 2 and not (tmp_path/"a/README.md").exists()
    before = [p.stat().st_mtime_ns for p in data(tmp_path/"a")]
    die.clear()
    folder = export_dataset(bank, tmp_path/"a", "cc0-1.0", metrics=VOTE.metrics, shard_bytes=raw)
    assert calls["read_group"] == 3 + 1 + 3 and [p.stat().st_mtime_ns for p in data(folder)[:2]] == before
    assert [p.read_bytes() for p in data(folder)] == [p.read_bytes() for p in data(whole)] and len(data(whole)) == 5
    with pytest.raises(RunOccupied, match="content"):
        export_dataset(bank, tmp_path/"a", "cc0-1.0", metrics=[PSNR_Y], shard_bytes=raw)


def test_import_goes_on(bank, tmp_path, deadly):
    folder = export_dataset(bank, tmp_path/"a", "cc0-1.0", reward=VOTE, shard_bytes=1e5)
    count, calls, die = deadly
    count(srnb.release, "write_table")
    die["write_table"] = 2
    with pytest.raises(KeyboardInterrupt): import_bank(folder, tmp_path/"new")
    assert finished_groups(tmp_path/"new") == ["photo 0", "photo 1"]
    die.clear()
    same_bank(bank, import_bank(folder, tmp_path/"new"))
    assert calls["write_table"] == 2 + 3


def test_two_ranks_import_one_bank(bank, tmp_path, monkeypatch):
    folder = export_dataset(bank, tmp_path/"a", "cc0-1.0", reward=VOTE, shard_bytes=1e5)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    same_bank(bank, import_bank(folder, tmp_path/"new"))


def change_rows(path, change): # of a parquet shard
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def png(image, **k):
    file = io.BytesIO()
    image.save(file, k.pop("format", "PNG"), **k)
    return file.getvalue()


def set_to(value, *keys):
    def change(rows):
        at = rows[1]
        for k in keys[:-1]: at = at[k]
        at[keys[-1]] = value(at[keys[-1]]) if callable(value) else value
    return change


GREY = png(to_pil(torch.zeros(3, 40, 40)).convert("L"))
JPEG = png(to_pil(torch.zeros(3, 40, 40)), format="JPEG")


@pytest.mark.parametrize("change, message", [
    (set_to("photo 0", "id"), r"two groups have the id 'photo 0'.*row 0 and .*row 1"),
    (set_to("../../photo", "id"), r"row 1: the id '../../photo' cannot be a file name"),
    (set_to(".hidden", "id"), "cannot be a file name"),
    (set_to(None, "id"), "cannot be a file name"),
    (set_to(float("nan"), "scores", "psnr_y", 4), r"row 1 \(photo 1\): score 'psnr_y' of candidate 4 is nan"),
    (set_to(float("inf"), "reward", 0), "reward of candidate 0 is inf"),
    (set_to(None, "scores", "lsd", 2), "score 'lsd' of candidate 2 is None"),
    (set_to(lambda v: v[:-1], "scores", "lsd"), "score 'lsd' needs 11 values"),
    (set_to(None, "scores", "lsd"), "score 'lsd' needs 11 values"),
    (set_to(lambda v: v[1:], "seeds"), "seeds needs 11 values"),
    (set_to(lambda v: v[:3], "sr"), "needs 11 values|needs 3 values"),
    (set_to([], "sr"), "no candidate"),
    (set_to(None, "sr"), "'sr' is not a list of images"),
    (set_to(dict(bytes=None, path="/etc/passwd"), "gt"), "named by a path"),
    (set_to(None, "lq"), "named by a path, or missing"),
    (set_to(dict(bytes=GREY, path=None), "sr", 7), "candidate 7 is no 8-bit RGB PNG but L"),
    (set_to(dict(bytes=JPEG, path=None), "sr", 7), "candidate 7 is damaged or no PNG"),
    (set_to(lambda o: dict(bytes=o["bytes"][:-40], path=None), "sr", 10), "candidate 10 is damaged"),
    (set_to(lambda o: dict(bytes=png(to_pil(torch.zeros(3, 8, 8))), path=None), "sr", 0),
     r"candidate 0 has the size \(3, 8, 8\), gt \(3, 40, 40\)"),
    (set_to(lambda o: dict(bytes=png(to_pil(torch.zeros(3, 9, 10))), path=None), "lq"), "is no enlargement of lq"),
])
def test_damaged_rows(bank, tmp_path, change, message):
    folder = export_dataset(bank, tmp_path/"a", "cc0-1.0", reward=VOTE, shard_bytes=1e9)
    change_rows(data(folder)[0], change)
    with pytest.raises(ValueError, match=message): import_bank(folder, tmp_path/"new")
    assert not (tmp_path/"new").exists()


def change_notes(table): # what a shard says of its bank
    about = json.loads(table.schema.metadata[b"srnb"])
    about["params"]["steps"] = 9
    return table.replace_schema_metadata({"srnb": json.dumps(about)})


def change_names(table): # one of its metrics has another name
    rows = table.to_pylist()
    for row in rows: row["scores"] = dict(other=row["scores"]["psnr_y"], lsd=row["scores"]["lsd"])
    return pa.Table.from_pylist(rows).replace_schema_metadata(table.schema.metadata)


@pytest.mark.parametrize("change, message", [
    (change_names, r"row 0 \(photo 2\): its scores differ from those of .*, row 0"),
    (change_notes, r"train-00001-of-00003.parquet: its parameters differ from those of .*train-00000")])
def test_shards_of_two_banks(bank, tmp_path, change, message):
    folder = export_dataset(bank, tmp_path/"a", "cc0-1.0", reward=VOTE, shard_bytes=1e5)
    path = data(folder)[1]
    pq.write_table(change(pq.read_table(path)), path)
    with pytest.raises(ValueError, match=message): import_bank(folder, tmp_path/"new")
    assert not (tmp_path/"new").exists()


def test_damaged_files(bank, tmp_path):
    folder = export_dataset(bank, tmp_path/"a", "cc0-1.0", reward=VOTE, shard_bytes=1e5)
    first, second = data(folder)[:2]
    whole = second.read_bytes()
    for k in (0, 1, 500, len(whole)//2, len(whole.rstrip(b"\0"))-1):
        second.write_bytes(whole[:k])
        with pytest.raises(ValueError, match=f"{second.name}.*download this shard again"):
            import_bank(folder, tmp_path/"new")
    second.unlink()
    with pytest.raises(ValueError, match=f"{second.name} is missing in"): import_bank(folder, tmp_path/"new")
    with pytest.raises(FileNotFoundError, match="no shard at"): import_bank([first, second], tmp_path/"new")
    with pytest.raises(FileNotFoundError, match="no folder"): import_bank(tmp_path/"none", tmp_path/"new")
    (tmp_path/"empty").mkdir()
    with pytest.raises(ValueError, match="holds no .parquet shard"): import_bank(tmp_path/"empty", tmp_path/"new")
    tar = tmp_path/"empty/train-00000-of-00001.tar" # as an earlier version wrote them
    tar.touch()
    for source in (tar.parent, [tar]):
        with pytest.raises(ValueError, match="no .parquet shard, .*parquet alone.* again"):
            import_bank(source, tmp_path/"new")
    assert not (tmp_path/"new").exists()


def test_flipped_bits(bank, tmp_path):
    "Page checksums of parquet and of PNG: no flipped bit changes an image or a score unseen"
    folder = export_dataset(bank, tmp_path/"a", "cc0-1.0", reward=VOTE, shard_bytes=1e9)
    path = data(folder)[0]
    whole, g = path.read_bytes(), generator(0)
    for k in range(12):
        at = int(torch.randint(4, len(whole)*9//10, (1,), generator=g)) # the footer at the end has no checksum
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at+1:])
        try: new = import_bank(folder, tmp_path/f"new{k}")
        except ValueError: continue
        same_bank(bank, new)
    at = whole.index(struct.pack("<d", score_bank(bank, [PSNR_Y]).value[0])) # a score has no PNG around it
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at+1:])
    with pytest.raises(ValueError, match="download this shard again"): import_bank(folder, tmp_path/"never")


def test_foreign_parquet(bank, tmp_path):
    "A table with the same columns but without our metadata, as another library would save it, is a bank too"
    folder = export_dataset(bank, tmp_path/"a", "cc0-1.0", reward=VOTE)
    other = tmp_path/"other.parquet"
    pq.write_table(pq.read_table(data(folder)[0]).replace_schema_metadata(None), other)
    new = import_bank([other], tmp_path/"new")
    assert json.loads((new/"config.json").read_text())["params"]["imported"]
    assert read_group(new, "photo 2").prompt == "a photo 2"
    assert torch.equal(read_group(new, "photo 2").sr, read_group(bank, "photo 2").sr)
    pq.write_table(pq.read_table(other).drop_columns(["gt"]), other)
    with pytest.raises(ValueError, match="no column 'gt', it has id, prompt, lq, sr"):
        import_bank([other], tmp_path/"never")


def test_card_of_a_bank(bank, tmp_path):
    from huggingface_hub import DatasetCard
    def photo(k): return dict(vars(embedded_photos()[0]), id=f"photo {k}", licence="CC0-1.0" if k else "CC-BY-4.0")
    photos = [SimpleNamespace(**photo(k)) for k in range(5)]
    told = dict(reward=VOTE, photos=photos, unknown="who pressed the shutter")
    folder = export_dataset(bank, tmp_path/"a", "cc-by-4.0", **told)
    card = DatasetCard.load(folder/"README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.to_dict()["configs"][0]["data_files"] == [dict(split="train", path="data/train-*.parquet")]
    for o in ("CC0-1.0 (4), CC-BY-4.0 (1)", "| `psnr_y` | compares with `gt` | higher |", "M = 11", "`none`",
              "| `lsd` | compares with `gt` | lower |", "`0123456789abcdef`", "- who pressed the shutter"):
        assert o in card.text, o
    def order(sr, gt=None): return torch.arange(len(sr)).double()
    both = Reward("both", fr=(PSNR_Y,), nr=(Metric("order", "nr", True, lambda: order),))
    folder = export_dataset(shutil.copytree(bank, tmp_path/"copy"), tmp_path/"c", "cc0-1.0", reward=both)
    for o in ("hybrid `both`: the mean of `psnr_y` and the mean of `order`, oriented", "licence not recorded",
              "| `order` | looks at the candidate alone | higher |"):
        assert o in (folder/"README.md").read_text(), o
    with pytest.raises(ValueError, match="no photograph of id 'photo 4'"):
        export_dataset(bank, tmp_path/"b", "cc0-1.0", photos=photos[:4])
    with pytest.raises(ValueError, match="needs a licence"): export_dataset(bank, tmp_path/"b", "")
    with pytest.raises(FileNotFoundError, match="no config.json"): export_dataset(tmp_path/"none", tmp_path/"b", "mit")
    assert not (tmp_path/"b").exists()


@pytest.fixture
def record(tmp_path):
    import pandas as pd
    def value(i, s, v): return 20. + i + .1*s + (v == "after")*(.5 + .1*i)
    rows = [(f"p{i}", s, "psnr_y", v, value(i, s, v)) for i in range(4) for s in range(3) for v in ("before", "after")]
    rows += [(f"p{i}", 0, "psnr_y", "bicubic", 19. + i) for i in range(4)]
    run = open_run(tmp_path/"run", dict(seed=7, backbone="/somewhere/sd2", photos=["/a/b.png"], loop=dict(steps=100)))
    write_table(run/"metrics.parquet", pd.DataFrame(rows, columns=["image", "seed", "metric", "variant", "value"]))
    return run


ABOUT = dict(base_model="owner/base", licence="openrail", data="photographs", cannot="Text.")


def test_card_of_an_adapter(tiny, tmp_path, record):
    from huggingface_hub import ModelCard
    policy = from_pretrained(tiny)
    policy.add_lora(4)
    adapter = save_adapter(policy, tmp_path/"adapter")
    card = ModelCard.load(write_card(adapter, record, interval, **ABOUT))
    assert (card.data.base_model, card.data.library_name, card.data.license) == ("owner/base", "peft", "openrail")
    want = interval(np.array([.5, .6, .7, .8]), np.arange(4)) # the difference by hand
    bicubic = interval(np.array([19., 20., 21., 22.]), np.arange(4))
    assert card.data.tags[-1] == "lora"
    for o in (f"| {want} |", f"| `psnr_y` | bicubic | {bicubic} |", "| loop.steps | 100 |", "| seed | 7 |"):
        assert o in card.text, o
    assert "/somewhere" not in card.text and "/a/b" not in card.text
    again = write_card(adapter, record, interval, against=None, hardware="one H100", **ABOUT).read_text()
    assert "difference" not in again and "one H100" in again
    for said, change in (("no variant 'start'", dict(against="start")), ("without cannot", dict(cannot=" ")),
                         ("not a folder", dict(base_model=str(tiny)))):
        with pytest.raises(ValueError, match=said): write_card(adapter, record, interval, **{**ABOUT, **change})
    with pytest.raises(FileNotFoundError, match="has not finished"): write_card(adapter, tmp_path, interval, **ABOUT)
    with pytest.raises(FileNotFoundError, match="holds no weights"): write_card(record, record, interval, **ABOUT)


def test_card_of_a_policy(tiny, tmp_path, record):
    from huggingface_hub import ModelCard
    folder = shutil.copytree(tiny, tmp_path/"policy")
    assert ModelCard.load(write_card(folder, record, interval, **ABOUT)).data.library_name == "srnb"
    (folder/"policy.json").unlink()
    (folder/"config.json").write_text('{"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.42"}')
    assert ModelCard.load(write_card(folder, record, interval, **ABOUT)).data.library_name == "diffusers"


class Hub:
    def __init__(self, **fails): self.fails, self.calls = fails, []

    def __getattr__(self, name):
        def call(*a, **k):
            self.calls.append((name, a, k))
            if name in self.fails: raise self.fails[name]
            return "https://hub/owner/name"
        return call


@pytest.fixture
def ready(tiny, tmp_path, record): # a folder that may be pushed
    folder = shutil.copytree(tiny, tmp_path/"policy")
    write_card(folder, record, interval, **ABOUT)
    return folder


def refusal(status):
    from huggingface_hub.errors import HfHubHTTPError
    return HfHubHTTPError(f"status {status}", response=SimpleNamespace(headers={}, status_code=status, request=None))


def test_push(ready, bank, tmp_path):
    hub = Hub()
    assert push(ready, "owner/name", api=hub) == "https://hub/owner/name"
    assert [n for n, _, _ in hub.calls] == ["whoami", "create_repo", "upload_folder"]
    assert hub.calls[1][2] == dict(repo_type="model", private=True, exist_ok=True)
    assert hub.calls[2][2]["folder_path"] == ready
    hub = Hub()
    push(export_dataset(bank, tmp_path/"a", "cc0-1.0"), "owner/name", private=False, api=hub)
    assert hub.calls[1][2]["repo_type"] == "dataset" and hub.calls[1][2]["private"] is False


@pytest.mark.parametrize("name, write, message", [
    ("optimizer.pt", b"x", "can run code"), ("a/b/PYTORCH_MODEL.BIN", b"x", "can run code"),
    ("last.ckpt", b"x", "can run code"),
    ("other.safetensors", b"\x80\x02pickle", "not a readable safetensors"),
    ("adapter_config.json", b'{"base_model_name_or_path": "/models/sd2"}',
     "names a folder of this machine, /models/sd2"),
    ("README.md", b"---\nlicense: [\n---\n", "front matter cannot be read"),
    ("README.md", b"# nothing\n", "states no licence"),
])
def test_push_refuses(ready, name, write, message):
    hub = Hub()
    (ready/name).parent.mkdir(parents=True, exist_ok=True)
    (ready/name).write_bytes(write)
    with pytest.raises(ValueError, match=message): push(ready, "owner/name", api=hub)
    assert not hub.calls


def test_push_needs(ready, tmp_path):
    hub = Hub()
    for bad in ("a/b/c", "owner/na me", "owner/name.git", "", "owner/-x", "o--x"):
        with pytest.raises(ValueError, match="repo_id must be 'owner/name'"): push(ready, bad, api=hub)
    (ready/"README.md").unlink()
    with pytest.raises(ValueError, match=r"holds no README.md"): push(ready, "owner/name", api=hub)
    (tmp_path/"empty").mkdir()
    with pytest.raises(ValueError, match="nothing to publish"): push(tmp_path/"empty", "owner/name", api=hub)
    with pytest.raises(FileNotFoundError): push(tmp_path/"none", "owner/name", api=hub)
    assert not hub.calls


def test_push_says_what_the_hub_said(ready):
    for error, said, hub in (
        (PermissionError, r"refused owner/name \(401\)", Hub(create_repo=refusal(401))),
        (PermissionError, r"refused owner/name \(403\)", Hub(create_repo=refusal(403))),
        (ConnectionError, "answered 500.*not sent twice", Hub(upload_folder=refusal(500))),
        (ConnectionError, "cannot be reached", Hub(upload_folder=TimeoutError("slow")))):
        with pytest.raises(error, match=said): push(ready, "owner/name", api=hub)


def test_push_with_the_real_client(ready, tmp_path, monkeypatch):
    "Nobody logged in, and a server that is not there, as huggingface_hub itself reports them"
    from huggingface_hub import HfApi, constants
    nowhere = HfApi(endpoint="http://127.0.0.1:9", token="hf_x")
    with pytest.raises(ConnectionError, match="cannot be reached"): push(ready, "owner/name", api=nowhere)
    for o in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"): monkeypatch.delenv(o, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path/"token"))
    with pytest.raises(PermissionError, match="hf auth login"): push(ready, "owner/name")

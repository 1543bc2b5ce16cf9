"Colours of the input are given back before anything is ranked: in banks, scores and evaluation"
import json

import numpy as np
import pytest
import torch
from PIL import Image

from srnb.align import DP2O, Run, align
from srnb.backbones import BackboneOptions, load_backbone, write_tiny, write_tiny_control
from srnb.command import main
from srnb.colour import Colour, adain_fix, low_band, to_linear, wavelet_fix
from srnb.config import fill
from srnb.core import RunOccupied, generator, quantize, read_run, to_pil
from srnb.curation import make_bank, read_group, score_bank
from srnb.images import upscale
from srnb.policies import from_pretrained, load_adapter
from srnb.rewards import PSNR_Y, Reward
from srnb.runs import Base, Data, Judging, evaluate, policy_of
from srnb.training import Loop


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    top = tmp_path_factory.mktemp("colour")
    control = write_tiny_control(load_backbone(write_tiny("sd", top/"sd")), top/"control")
    return top/"sd", BackboneOptions(control=str(control))


def photos(n=2): # (id, lq, gt)
    g = generator(0)
    return [(f"p{k}", torch.rand(3, 16, 16, generator=g), torch.rand(3, 64, 64, generator=g)) for k in range(n)]


def from_pil(file):
    with Image.open(file) as im: return torch.from_numpy(np.asarray(im).copy()).permute(2, 0, 1).float().div(255)


def note(folder): return json.loads((folder/"config.json").read_text())["params"]


def test_a_backbones_candidates_are_fixed_as_its_images_are_shown(sd, tmp_path):
    policy, rows = load_backbone(*sd), photos()
    bank = make_bank(tmp_path/"bank", policy, rows, 2, 2)
    assert note(bank)["colour"] == dict(fix="adain", strength=1., linear=False)
    raw = make_bank(tmp_path/"raw", policy, rows, 2, 2, colour=Colour("none"))
    assert "colour" not in note(raw)
    for i, lq, _ in rows:
        y, got, plain = policy.codec.upsample(lq[None]), read_group(bank, i).sr, read_group(raw, i).sr
        assert torch.equal(got, quantize(adain_fix(plain, y.expand_as(plain)))) and not torch.equal(got, plain)
        shown = upscale(lq[None], policy, steps=2) # of another noise
        torch.testing.assert_close(shown.mean((-2, -1)), got[:1].mean((-2, -1)), atol=.02, rtol=0)
    for other in ("raw", "bank"): # a bank with another fix is refused
        with pytest.raises(RunOccupied, match="colour"):
            make_bank(tmp_path/other, policy, rows, 2, 2, colour=Colour("wavelet", .5))
    scores = [score_bank(o, [PSNR_Y]).value for o in (raw, bank)]
    tables = [evaluate(dict(sr=o), ["p0", "p1"], [PSNR_Y]) for o in (raw, bank)]
    judged = [o[(o.variant == "sr") & (o.metric == "psnr_y")].value for o in tables]
    assert (scores[0] != scores[1]).all() and [o.tolist() for o in judged] == [o.tolist() for o in scores]


def test_a_small_policy_stays_bit_for_bit(tiny, tmp_path):
    policy, rows = from_pretrained(tiny), photos()
    banks = [make_bank(tmp_path/name, policy, rows, 2, 2, **how) for name, how in
             (("auto", {}), ("none", dict(colour=Colour("none"))), ("zero", dict(colour=Colour("adain", 0.))))]
    assert len({(o/"groups"/"p0.safetensors").read_bytes() for o in banks}) == 1
    assert note(banks[0]) == note(banks[1]) == note(banks[2]) and "colour" not in note(banks[0])
    fixed = read_group(make_bank(tmp_path/"fixed", policy, rows, 2, 2, colour=Colour("wavelet")), "p0").sr
    assert not torch.equal(fixed, read_group(banks[0], "p0").sr)


def test_a_run_ranks_and_judges_fixed_samples(sd, tmp_path):
    folder, options = sd
    base = Base(str(folder), precision="no", sample_steps=2, options=options)
    run = Run(str(tmp_path/"a"), fill(DP2O, dict(n=1)), Data(size=64, take=2, places=1), base,
              Judging(Reward("psnr", fr=(PSNR_Y,)), m=2, judges=(PSNR_Y,), eval_m=1), Loop(steps=1), rank=2, batch=1)
    align(run)
    other = align(fill(run, {"out": str(tmp_path/"b"), "base.colour.fix": "none"}))
    assert read_run(tmp_path/"a")[0]["params"]["config"]["base"]["colour"]["fix"] == "auto"
    a, b = ((o/"metrics.parquet").read_bytes() for o in (tmp_path/"a", other))
    assert a != b
    for bank in ("bank", "before", "bank-after"):
        assert note(tmp_path/"a"/bank)["colour"]["fix"] == "adain" and "colour" not in note(other/bank)
    with pytest.raises(RunOccupied): align(fill(run, {"base.colour.strength": .5}))
    to_pil(photos()[0][1]).save(tmp_path/"in.png") # an adapter's images are shown as its run has judged them
    for which, colour in ((tmp_path/"a", Colour()), (other, Colour("none"))):
        words = ["upscale", str(tmp_path/"in.png"), "-o", str(tmp_path/"out.png"), "--adapter", str(which), "--force"]
        assert main([*words, "--steps", "2", "--dtype", "float32"]) == 0
        policy, x = load_adapter(policy_of(run.base), which), from_pil(tmp_path/"in.png")
        torch.testing.assert_close(from_pil(tmp_path/"out.png"), upscale(x, policy, steps=2, colour=colour))


@pytest.mark.parametrize("fix, whole", [("adain", adain_fix), ("wavelet", wavelet_fix)])
@pytest.mark.parametrize("linear", [False, True])
def test_a_strength_leads_from_nothing_to_all(fix, whole, linear):
    x, y = (torch.rand(2, 3, 32, 48, generator=generator(k))*.4+.3 for k in range(2))
    at = [Colour(fix, s, linear).of(None) for s in (0., .5, 1.)]
    seen = to_linear if linear else lambda o: o
    assert at[0] is None # identity
    torch.testing.assert_close(seen(at[2](x, y)), whole(seen(x), seen(y)), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen(at[1](x, y)), (seen(x)+whole(seen(x), seen(y)))/2, atol=1e-5, rtol=0)
    if fix == "adain": torch.testing.assert_close(seen(at[2](x, y)).mean((-2, -1)), seen(y).mean((-2, -1)))
    else: torch.testing.assert_close(seen(at[2](x, y))-seen(x), low_band(seen(y)-seen(x)), atol=1e-5, rtol=0)

"Scales 1 to 8: sizes, degradations, ready pairs, a base from training to upscaling, and what is refused"
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from srnb.align import DP2O, ASASR, Run, Top, align
from srnb.baselines import baseline_at, bicubic_at, spandrel_model
from srnb.command import main
from srnb.config import fill
from srnb.core import check_multiple, check_scale, generator, quantize, read_run, write_image
from srnb.curation import read_group
from srnb.data import PatchPool, find_photos, make_pair, paired_folder
from srnb.degrade import RESSHIFT_TEST, RESSHIFT_TRAIN, SEESR, degrade
from srnb.images import is_result, upscale
from srnb.nets import OneStepConfig, OneStepUNet, SmallUNet, SwinConfig, UNetConfig
from srnb.onestep import BaseRun, CTMSRRun, Match, evaluate_base, train_base, train_ctmsr
from srnb.paths import Shift
from srnb.policies import PixelCodec, Policy, ResidualCodec, from_pretrained, named_scale, save_pretrained
from srnb.rewards import PSNR_Y
from srnb.runs import Base, Data, Judging
from srnb.training import Loop

SCALES, SLOW = range(1, 9), pytest.mark.slow
FEW = Loop(steps=2, lr=1e-3, warmup=1, save_every=2, log_every=1)
SMALL = UNetConfig((8, 8), (1, 1), 8, 8, 1)


def fill_weights(net):
    g = generator(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g)*(.5*p[0].numel()**-.5 if p.ndim > 1 else .05))
    return net.eval()


def base(scale, **change): return Policy(fill_weights(SmallUNet(replace(SMALL, scale=scale, **change))),
                                         codec=ResidualCodec(factor=scale))


def one_step(scale):
    net = fill_weights(OneStepUNet(OneStepConfig((8, 8), (1, 1), 8, 4, scale)))
    return Policy(net, Shift(), Shift(), PixelCodec(factor=scale))


def picture(h, w, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (-(-h//8), -(-w//8), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((w, h), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    "pairs(scale): a folder of ready pairs, with originals of 120x120 pixels"
    def make(scale, n=8, side=120, first=0):
        folder = tmp_path_factory.mktemp(f"pairs{scale}")
        for k in range(first, first+n):
            gt = torch.from_numpy(np.array(picture(side, side, k))).permute(2, 0, 1).float()/255
            noise = .05*torch.randn(3, side//scale, side//scale, generator=generator(k))
            write_image(folder/f"gt/{k}.png", gt)
            write_image(folder/f"lq/{k}.png", quantize((bicubic_down(gt, side//scale)+noise).clamp(0, 1)))
        return folder
    return make


def bicubic_down(gt, side): return torch.nn.functional.interpolate(gt[None], (side, side), mode="area")[0]


# ---------------------------------------------------------------- what a scale is

@pytest.mark.parametrize("bad", [0, 9, 2.5, -1, True, "2", None])
def test_refused_everywhere_by_one_rule(bad, pairs):
    "0, 9, 2.5: the same sentence, wherever a scale is given"
    rule = "must be a whole number from 1 to 8, got"
    gt = torch.rand(3, 64, 64, generator=generator(0))
    calls = [lambda: check_scale(bad), lambda: ResidualCodec(factor=bad), lambda: PixelCodec(factor=bad),
             lambda: UNetConfig(scale=bad), lambda: OneStepConfig(scale=bad), lambda: bicubic_at(bad),
             lambda: degrade(gt, RESSHIFT_TEST, generator(0), bad)]
    for call in calls:
        with pytest.raises(ValueError, match=rule): call()


def test_swin_names_the_class_to_take():
    with pytest.raises(ValueError, match="OneStepUNet.*got scale 2"): SwinConfig(scale=2)


def test_a_multiple_that_is_near():
    check_multiple(64, 4, "patch")
    with pytest.raises(ValueError, match="patch must be a multiple of 12, got 64; 60 and 72 are near"):
        check_multiple(64, 12, "patch")
    with pytest.raises(ValueError, match="got 5; 12 is near"): check_multiple(5, 12, "patch")


def test_network_and_codec_agree():
    with pytest.raises(ValueError, match="network enlarges 2 times and its codec 4 times"):
        Policy(SmallUNet(replace(SMALL, scale=2)), codec=ResidualCodec())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("d", [RESSHIFT_TEST, RESSHIFT_TRAIN, SEESR], ids=lambda d: d.name)
def test_degradations(scale, d):
    "The size is exact; at scale 1 it stays, and the picture is damaged"
    gt = torch.from_numpy(np.array(picture(40*scale, 48*scale))).permute(2, 0, 1).float()/255
    lq = degrade(gt, d, generator(1), scale)
    assert lq.shape == (3, 40, 48) and torch.equal(lq, quantize(lq))
    assert scale > 1 or (lq-gt).abs().mean() > 1/255


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("make", [base, one_step])
def test_written_and_read(scale, make, tmp_path):
    "The file says the scale, and the sizes of samples follow"
    policy = make(scale)
    again = from_pretrained(save_pretrained(policy, tmp_path))
    assert again.codec == policy.codec and again.codec.factor == scale == named_scale(tmp_path)
    lq = torch.rand(1, 3, 4, 6, generator=generator(0))
    a, b = (o.sample(lq, [3], 2 if make is base else 1) for o in (policy, again))
    assert a.shape == (1, 1, 3, 4*scale, 6*scale) and torch.equal(a, b)


def test_named_scale(tmp_path):
    assert named_scale("small") == named_scale("onestep") == 4
    with pytest.raises(FileNotFoundError, match="no policy"): named_scale(tmp_path/"none")


# ---------------------------------------------------------------- sizes

@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("make", [base, one_step])
def test_sizes_are_exact(scale, make):
    "50 odd inputs, whole and in tiles"
    policy, draw = make(scale), np.random.default_rng(scale)
    sizes = [(1, 1), (1, 61), (37, 1), (3, 5), (37, 61), *draw.integers(0, 11, (45, 2))*2+1]
    for h, w in sizes:
        image = picture(h, w)
        for tile in (None, 16):
            out = upscale(image, policy, tile=tile, overlap=4, steps=1, say=str)
            assert out.size == (scale*w, scale*h), (h, w, tile)


@pytest.mark.parametrize("scale", [2, 3])
def test_tiles_are_the_whole(scale):
    "With a network that sees as far as the overlap, tiles give what the whole gives"
    policy, image = base(scale, channels=(8,), blocks=(1,)), picture(41, 53)
    whole, tiled = (np.array(upscale(image, policy, tile=t, overlap=16, steps=1, say=str)).astype(int)
                    for t in (None, 32))
    assert np.abs(whole-tiled).max() <= 1


@pytest.mark.parametrize("stride, scale", [(1, 2), (8, 3), (4, 6)])
def test_a_stride_that_is_no_multiple_of_the_scale(stride, scale):
    "An own network's stride need not be one: the grid of the input is the least that serves both"
    class Own:
        codec = PixelCodec(factor=scale)
        def solve(self, lq, noise, steps=None):
            assert all(scale*n % stride == 0 for n in lq.shape[-2:])
            return quantize(self.codec.upsample(lq))
    Own.stride = stride
    assert upscale(picture(13, 21), Own(), tile=16, overlap=4, say=str).size == (21*scale, 13*scale)


# ---------------------------------------------------------------- less than the network's

@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_reduced(scale):
    "The network's result, reduced by bicubic; one line says so; transparency goes with it"
    policy, image, said = base(4), picture(13, 9), []
    image.putalpha(picture(13, 9, 1).convert("L"))
    full, less = upscale(image, policy, steps=1, say=str), upscale(image, policy, steps=1, say=said.append, scale=scale)
    assert less.size == (9*scale, 13*scale) and less.mode == "RGBA"
    line = f"the network enlarges 4 times; the result is reduced to {scale} times"
    assert said == ([line] if scale < 4 else [])
    if scale == 4: assert np.array_equal(np.array(full), np.array(less))
    else:
        small = np.array(full.convert("RGB").resize((9*scale, 13*scale), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(np.array(less.convert("RGB")).astype(int)-small).mean() < 1.5


def test_more_than_the_network_is_refused():
    with pytest.raises(ValueError, match="enlarges 2 times, less than the scale 3"):
        upscale(picture(9, 9), base(2), scale=3)
    for bad in (0, 9, 2.5):
        with pytest.raises(ValueError, match="whole number from 1 to 8"): upscale(picture(9, 9), base(2), scale=bad)


def test_command(tmp_path, monkeypatch, capsys):
    "A policy of any scale, --scale below it, and results that are there already"
    monkeypatch.chdir(tmp_path)
    save_pretrained(base(3), "three")
    picture(9, 13).save("a.png"), picture(7, 5).save("b.png")
    call = ["upscale", "a.png", "b.png", "-o", "out", "--model", "three", "--steps", "1"]
    assert main(call) == 0 and Image.open("out/a.png").size == (39, 27)
    assert main(call) == 0 and "2 done before" in capsys.readouterr().err
    assert main([*call, "--scale", "2", "--skip"]) == 1
    assert "out/a.png exists and is not the whole result" in capsys.readouterr().err
    assert main([*call, "--scale", "2", "--force"]) == 0 and Image.open("out/b.png").size == (10, 14)
    said = capsys.readouterr().err
    assert said.count("the network enlarges 3 times; the result is reduced to 2 times") == 1
    assert main([*call, "--scale", "2", "--skip"]) == 0
    assert main([*call[:4], "more", *call[5:], "--scale", "4"]) == 2
    assert "enlarges 3 times, less than the scale 4" in capsys.readouterr().err
    for bad in ("0", "9", "2.5"): assert main([*call, "--scale", bad]) == 2
    assert not (tmp_path/"more").exists()


def test_a_result_of_another_scale_is_none(tmp_path):
    picture(26, 18).save(tmp_path/"r.png")
    assert is_result(tmp_path/"r.png", (9, 13), 2) and not is_result(tmp_path/"r.png", (9, 13), 4)


# ---------------------------------------------------------------- ready pairs

@pytest.mark.parametrize("scale", SCALES)
def test_pairs_say_their_scale(scale, pairs):
    folder = pairs(scale, 3, 840 if scale == 7 else 120)
    assert len(paired_folder(folder/"lq", folder/"gt")) == 3
    photo = find_photos(folder)[0]
    lq, gt = make_pair(photo, (8*scale, 6*scale), RESSHIFT_TEST, scale)
    assert lq.shape == (3, 8, 6) and gt.shape == (3, 8*scale, 6*scale)
    other = scale % 8 + 1
    with pytest.raises(ValueError, match=f"pair of scale {scale}.*scale {other}"):
        make_pair(photo, 8*other, RESSHIFT_TEST, other)


def test_pairs_of_mixed_scales(pairs):
    "The file that differs is named, whichever comes first"
    folder = pairs(2)
    write_image(folder/"lq/0.png", torch.rand(3, 30, 30, generator=generator(0)))
    with pytest.raises(ValueError, match=r"0\.png.*scale 4.*others have scale 2"): find_photos(folder)
    write_image(folder/"lq/0.png", torch.rand(3, 50, 50, generator=generator(0)))
    with pytest.raises(ValueError, match=r"0\.png has 120×120.*0\.png has 50×50.*whole number"): find_photos(folder)


def test_pool_of_pairs_of_another_scale(pairs):
    with pytest.raises(ValueError, match="pair of scale 2"): PatchPool(find_photos(pairs(2)), RESSHIFT_TEST, scale=4)


# ---------------------------------------------------------------- a base from training to upscaling

@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory):
    "trained(scale, ready): the folder of a tiny base"
    made = {}

    def make(scale, ready=False):
        if (scale, ready) not in made:
            out = tmp_path_factory.mktemp("runs")/f"base{scale}"
            run = BaseRun(str(out), versions=1, max_side=160, net=replace(SMALL, scale=scale), patch=24, batch=2,
                          precision="no", loop=FEW, photos=(str(pairs(scale)),) if ready else ())
            made[scale, ready] = train_base(run), run
        return made[scale, ready]
    return make


@pytest.mark.parametrize("scale, ready", [(2, False), (3, False), (1, True), pytest.param(2, True, marks=SLOW),
                                          pytest.param(1, False, marks=pytest.mark.repeat)])
def test_a_base_of_this_scale(scale, ready, trained, pairs, tmp_path):
    "Trained, evaluated, aligned, saved, loaded and upscaled, as at four"
    out, _ = trained(scale, ready)
    folders, others = ((str(pairs(scale, first=k)),) if ready else () for k in (0, 8))
    policy = from_pretrained(out)
    assert policy.codec.factor == scale and policy.codec.scale > 0
    data = Data(folders, others, size=96, places=1, take=2)
    table = evaluate_base(out, replace(data, photos=()), 2, 2)
    assert set(table.variant) == {"sample", "mean", "bicubic"} and table.value.notna().all()
    run = Run(str(tmp_path/"run"), replace(DP2O, winners=Top(1)), data, Base(str(out), precision="no", sample_steps=2),
              Judging("offline_nr", m=2, judges=(PSNR_Y,), eval_m=2), FEW, rank=2, batch=2, patch=24)
    done = align(run)
    group = read_group(done/"before", sorted(read_run(done)[1].image.unique())[0])
    assert group.sr.shape[-1] == 96 == scale*group.lq.shape[-1] and group.gt.shape[-1] == 96
    assert set(read_run(done)[1].variant) >= {"before", "after", "bicubic"}
    assert {"truth", "bicubic"} < {*pd.read_parquet(done/"psd.parquet").variant}
    picture(9, 13).save(tmp_path/"a.png")
    assert main(["upscale", str(tmp_path/"a.png"), "-o", str(tmp_path/"b.png"), "--adapter", str(done)]) == 0
    assert Image.open(tmp_path/"b.png").size == (13*scale, 9*scale)


def test_a_base_goes_on_from_another(trained, tmp_path):
    "The policy that init names decides the scale; net is left out"
    out, run = trained(3)
    more = train_base(replace(run, out=str(tmp_path/"more"), init=str(out), net=UNetConfig()))
    assert from_pretrained(more).codec == from_pretrained(out).codec


def test_pairs_that_are_equal_have_no_residual(pairs, tmp_path):
    folder = pairs(1)
    for k in range(8): (folder/f"lq/{k}.png").write_bytes((folder/f"gt/{k}.png").read_bytes())
    run = BaseRun(str(tmp_path/"x"), (str(folder),), net=replace(SMALL, scale=1), patch=24, batch=2, loop=FEW)
    with pytest.raises(ValueError, match="nothing to learn"): train_base(run)


def test_pairs_of_another_scale_than_the_network(trained, pairs, tmp_path, idle):
    "Of a new base, of an adapter, of an evaluation: before any work"
    out, run = trained(3)
    two = str(pairs(2))
    with pytest.raises(ValueError, match=r"\.png.*pair of scale 2.*scale 3"):
        train_base(replace(run, out=str(tmp_path/"x"), photos=(two,)))
    config = Run(str(tmp_path/"y"), replace(DP2O, winners=Top(1)), Data((two,), size=96, places=1),
                 Base(str(out), precision="no"), Judging("offline_nr", m=2, judges=("psnr_y",)), FEW, patch=24)
    with pytest.raises(ValueError, match=r"\.png.*pair of scale 2.*scale 3"): align(config)
    with pytest.raises(ValueError, match="pair of scale 2.*scale 3"):
        evaluate_base(out, Data(held_out=(two,), size=96))
    assert not (tmp_path/"x").exists() and not (tmp_path/"y").exists()


@pytest.mark.parametrize("what", ["patch", "size"])
def test_patches_off_the_grid(what, trained, tmp_path, idle):
    "The error says which sizes are near"
    out, run = trained(3)
    if what == "patch":
        with pytest.raises(ValueError, match="stride 6, got 64; 60 and 66 are near"):
            train_base(replace(run, out=str(tmp_path/"x"), patch=64))
    config = Run(str(tmp_path/"y"), data=Data(size=96, places=1), base=Base(str(out), precision="no"), patch=24)
    with pytest.raises(ValueError, match=f"{what} .*stride 6, got 64; 60 and 66 are near"):
        align(fill(config, {what: 64}))


def test_outputs_of_another_scale(trained, tmp_path, idle):
    "Real-ESRGAN enlarges four times, so its outputs cannot lose to a network that enlarges three times"
    out, _ = trained(3)
    config = Run(str(tmp_path/"y"), ASASR, Data(size=96, places=1), Base(str(out), precision="no"),
                 Judging(None, judges=("psnr_y",)), FEW, patch=24)
    with pytest.raises(ValueError, match="real_esrgan enlarges 4 times, not 3"): align(config)


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_ctmsr(scale, tmp_path):
    "A one-step network of another scale, from photographs to a picture"
    match = Match(refresh=2, match_loop=replace(FEW, save_every=1))
    run = CTMSRRun(str(tmp_path/"run"), degradation=RESSHIFT_TEST, versions=1, max_side=160, patch=48, window=32,
                   batch=2, net=OneStepConfig((8, 8), (1, 1), 8, 4, scale), size=96, eval_m=2, judges=(PSNR_Y,), take=2,
                   precision="no", loop=FEW, match=match)
    out = train_ctmsr(run)
    policy = from_pretrained(out)
    assert policy.codec == PixelCodec(factor=scale) and read_run(out)[1].value.notna().all()
    assert upscale(picture(5, 7), policy).size == (7*scale, 5*scale)


# ---------------------------------------------------------------- networks of others

def test_baselines():
    lq = torch.rand(2, 3, 5, 7, generator=generator(0))
    for s in SCALES:
        sr = bicubic_at(s)(lq)
        assert sr.shape == (2, 3, 5*s, 7*s) and bicubic_at(s).scale == s == baseline_at("bicubic", s).scale
    assert torch.equal(bicubic_at(1)(quantize(lq)), quantize(lq))
    for n in ("real_esrgan", "dat_light"):
        assert baseline_at(n, 4).scale == 4
        with pytest.raises(ValueError, match=f"{n} enlarges 4 times, not 2"): baseline_at(n, 2)


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_a_checkpoint_says_its_scale(scale, tmp_path):
    from safetensors.torch import save_file
    from spandrel.architectures.Compact import Compact
    state = Compact(num_feat=4, num_conv=1, upscale=scale).state_dict()
    save_file({k: v*0 for k, v in state.items()}, tmp_path/"net.safetensors")
    model = spandrel_model(tmp_path/"net.safetensors")
    assert model.scale == scale and model(torch.rand(1, 3, 4, 6)).shape == (1, 3, 4*scale, 6*scale)

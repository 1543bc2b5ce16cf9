"Rewards: directions on human scores, invariances, refusals that come early, and the ladder at both crop sizes"
import json
import logging
import re
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
import weakref
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from srnb import rewards as R
from srnb.core import generator, quantize
from srnb.data import centre_crop, embedded_photos

A = R.Metric("a", "fr", False, lambda: lambda sr, gt: (sr-gt).abs().mean((1, 2, 3)))
B = R.Metric("b", "fr", True, lambda: lambda sr, gt: sr.mean((1, 2, 3)))
C = R.Metric("c", "nr", True, lambda: lambda sr, gt: sr.std((1, 2, 3)))
TOY = R.Reward("toy", fr=(A, B), nr=(C,))
PYIQA = [m for m in vars(R).values() if isinstance(m, R.Metric) and "package pyiqa" in m.needs]


@pytest.fixture(scope="module")
def group(): # gt (3,64,80), sr (6,3,64,80)
    g = generator(0)
    gt = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 10, generator=g), size=(64, 80), mode="bicubic")
    gt = quantize(gt)[0]
    return gt, quantize(gt + torch.linspace(.01, .1, 6).view(6, 1, 1, 1)*torch.randn(6, 3, 64, 80, generator=g))


@pytest.fixture(scope="module")
def people():
    data = files("qualisr.sample_data")
    fr, nr = (pd.read_csv(data/f"features/{k}.csv") for k in ("fr", "nr"))
    t = fr.merge(nr, on="sample_id", suffixes=("", "_nr"))
    labels = pd.read_csv(data/"scores/labels.csv")
    t["sample"] = t.sr_method.str.lower() + ":" + t.sr_filename.str.removesuffix(".png")
    labels["sample"] = labels.method + ":" + labels.test_case
    t = t.merge(labels[["sample", "score", "test_case"]], on="sample", validate="1:1")
    assert len(t) == 120 and t.test_case.nunique() == 40
    return t.rename(columns=lambda c: c.removesuffix("_gt"))


def share(values, people):
    a = R.pair_agreement(values, people.score, people.test_case)
    return a.agree.sum()/a.pairs.sum()


def hybrid_of(people, reward, normaliser):
    out = np.empty(len(people))
    for i in people.groupby("test_case").indices.values(): out[i] = R.hybrid(people.iloc[i], reward, normaliser)
    return out


# directions

@pytest.mark.parametrize("name,higher_better,known", [("psnr", True, .317), ("lpips-vgg", False, .567),
                         ("stlpips-vgg", False, .658), ("musiq", True, .842), ("qalign", True, .867)])
def test_direction_on_people(people, name, higher_better, known):
    m = R.Metric(name, "fr", higher_better, None)
    assert share(R.orient(people[name], m), people) == pytest.approx(known, abs=.001)
    turned = replace(m, higher_better=not higher_better)
    assert share(R.orient(people[name], turned), people) == pytest.approx(1-known, abs=.001)


def test_hybrid_on_people(people):
    fr = tuple(R.Metric(n, "fr", False, None) for n in ("lpips-vgg", "stlpips-vgg"))
    nr = tuple(R.Metric(n, "nr", True, None) for n in ("musiq", "qalign"))
    both, wrong = R.Reward("both", fr, nr), R.Reward("wrong", tuple(replace(m, higher_better=True) for m in fr), nr)
    rewards = both, wrong, R.Reward("fr", fr), R.Reward("nr", (), nr)
    got = {r.name: share(hybrid_of(people, r, R.GroupMinMax()), people) for r in rewards}
    assert got["both"] == pytest.approx(.775, abs=.001)
    assert got["wrong"] == pytest.approx(.725, abs=.001) # it hides: the other half carries it
    assert got["fr"] == pytest.approx(.583, abs=.001) and got["nr"] == pytest.approx(.825, abs=.001)
    halves = R.Reward("fr", wrong.fr)
    assert share(hybrid_of(people, halves, R.GroupMinMax()), people) == pytest.approx(1-.583, abs=.001)
    bounds = R.fit_bounds(people, both.metrics)
    assert share(hybrid_of(people, both, bounds), people) == pytest.approx(.792, abs=.001)


@pytest.mark.parametrize("metric", PYIQA, ids=lambda m: m.name)
def test_direction_and_kind_agree_with_pyiqa(metric):
    from pyiqa.default_model_configs import DEFAULT_CONFIGS
    theirs = DEFAULT_CONFIGS[metric.name]
    assert metric.higher_better is not theirs.get("lower_better", False)
    assert metric.kind == theirs["metric_mode"].lower()


def test_dp2o_is_the_papers_nine():
    assert [m.name for m in R.DP2O.fr] == ["lpips-vgg", "topiq_fr", "afine_fr"]
    assert [m.name for m in R.DP2O.nr] == ["maniqa-pipal", "musiq", "clipiqa+", "topiq_nr", "afine_nr", "qalign"]
    assert [m.name for m in R.DP2O.metrics if not m.higher_better] == ["lpips-vgg", "afine_fr", "afine_nr"]


def test_wrong_direction_or_id_is_a_mismatch():
    with pytest.raises(R.MetricMismatch, match="pyiqa says"): R.scorer_of(R.pyiqa_metric("gmsd", "fr", True))
    with pytest.raises(R.MetricMismatch, match="pyiqa says"): R.scorer_of(R.pyiqa_metric("piqe", "fr", False))
    with pytest.raises(R.MetricMismatch, match="no metric"): R.scorer_of(R.pyiqa_metric("gsmd", "fr", False))


# normalisers and the hybrid

def test_fixture_7_affine_rescaling_leaves_the_reward():
    g = generator(1)
    raw = {m.name: torch.randn(8, generator=g, dtype=torch.float64) for m in TOY.metrics}
    for name in raw:
        scaled = raw | {name: 13*raw[name] - 4}
        torch.testing.assert_close(R.hybrid(scaled, TOY), R.hybrid(raw, TOY), atol=1e-12, rtol=0)
        torch.testing.assert_close(R.hybrid(scaled, TOY, R.fit_bounds(scaled, TOY.metrics)),
                                   R.hybrid(raw, TOY, R.fit_bounds(raw, TOY.metrics)), atol=1e-12, rtol=0)
        assert not torch.allclose(R.hybrid(raw | {name: -raw[name]}, TOY), R.hybrid(raw, TOY))


def test_the_halves_weigh_the_same():
    fr = tuple(R.Metric(f"f{i}", "fr", True, None) for i in range(3))
    nr = tuple(R.Metric(f"n{i}", "nr", True, None) for i in range(6))
    raw = {m.name: [0., 1., 0.] for m in fr} | {m.name: [0., 0., 1.] for m in nr}
    assert R.hybrid(raw, R.Reward("r", fr, nr)).tolist() == [0., .5, .5]


def test_group_min_max_guards():
    assert R.GroupMinMax()([2., 2., 2.], A).tolist() == [.5]*3
    assert R.GroupMinMax()(np.array([1., 3.], np.float32), A).tolist() == [1., 0.]
    with pytest.raises(ValueError, match="a has M = 1"): R.GroupMinMax()([1.], A)
    with pytest.raises(ValueError, match="a gave inf for candidate 2"): R.GroupMinMax()([1., 2., float("inf")], A)
    with pytest.raises(ValueError, match=r"a: need one score per candidate, got shape \(0,\)"): R.GroupMinMax()([], A)


def test_global_bounds_travel_and_do_not_clip(tmp_path):
    bounds = R.fit_bounds({"a": [[.2, .6], [.3, .4]], "c": [1, 2, 3, 4]}, [A, C])
    again = R.GlobalBounds.load(bounds.save(tmp_path/"bounds.json"))
    assert again == bounds and json.loads((tmp_path/"bounds.json").read_text()) == [["a", .6, .2], ["c", 1., 4.]]
    np.testing.assert_allclose(again([.6, .2, .1, .8], A), [0, 1, 1.25, -.5], atol=1e-12)
    assert again([4.], C).tolist() == [1.]
    with pytest.raises(ValueError, match="no bounds for b"): again([1.], B)
    with pytest.raises(ValueError, match="against its direction"): again([1.], replace(A, higher_better=True))
    with pytest.raises(ValueError, match="cannot rank"): R.fit_bounds({"a": [1., 1.]}, [A])
    with pytest.raises(ValueError, match="holds no scores of c"): R.fit_bounds({"a": [1., 2.]}, [A, C])
    with pytest.raises(ValueError, match="a gave nan"): R.fit_bounds({"a": [1., float("nan")]}, [A])


def test_hybrid_refuses():
    raw = {"a": [1., 2.], "b": [1., 2.], "c": [1., 2.]}
    with pytest.raises(ValueError, match="c gave nan for candidate 1"): R.hybrid(raw | {"c": [1., float("nan")]}, TOY)
    with pytest.raises(ValueError, match="no scores of b"): R.hybrid({"a": [1., 2.], "c": [1., 2.]}, TOY)
    with pytest.raises(ValueError, match="numbers of candidates differ"): R.hybrid(raw | {"c": [1., 2., 3.]}, TOY)
    with pytest.raises(ValueError, match="M = 1"): R.hybrid({k: [1.] for k in "abc"}, TOY)
    with pytest.raises(ValueError, match="holds no metric"): R.Reward("empty")
    with pytest.raises(ValueError, match="twice"): R.Reward("twice", fr=(A, A))
    with pytest.raises(ValueError, match="other kind"): R.Reward("mixed", fr=(C,))
    with pytest.raises(ValueError, match="must be 'fr' or 'nr'"): R.Metric("x", "rr", True, None)


def test_pair_agreement_counts_ties():
    t = R.pair_agreement([1, 1, 0, 5, 4], [3, 2, 2, 1, 0], ["p", "p", "p", "q", "q"])
    assert t.loc["p"].tolist() == [1.5, 2] and t.loc["q"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="NaN"): R.pair_agreement([1., float("nan")], [1, 2], ["p", "p"])


# the boundary

def test_score_refuses(group):
    gt, sr = group
    with pytest.raises(ValueError, match="a compares with the ground truth"): R.score(A, sr)
    with pytest.raises(ValueError, match="differ in size"): R.score(A, sr, gt[:, 4:])
    with pytest.raises(ValueError, match="sr must lie in"): R.score(C, sr*2)
    with pytest.raises(TypeError, match="float32"): R.score(C, sr.double())
    small = sr[..., :16, :16], gt[:, :16, :16]
    with pytest.raises(ValueError, match="1 leave fewer than|leave fewer than 11"): R.score(R.SSIM_Y, *small)
    few = R.Metric("few", "nr", True, lambda: lambda sr, gt: sr.mean((1, 2, 3))[:-1])
    with pytest.raises(ValueError, match=r"few: \(5,\) scores for 6 candidates"): R.score(few, sr)
    factor = torch.tensor([1, 1, 1, float("nan"), 1, 1])
    nan = R.Metric("nan", "nr", True, lambda: lambda sr, gt: sr.mean((1, 2, 3)).log()*factor)
    with pytest.raises(ValueError, match="nan gave nan for candidate 3"): R.score(nan, sr)


def test_scores_of_a_candidate_do_not_depend_on_its_group(group):
    gt, sr = group
    for m in (*R.OFFLINE.metrics, R.PSNR_Y, R.SSIM_Y, R.CVVDP):
        all_, some = R.score(m, sr, gt), R.score(m, sr[[4, 1, 2]], gt)
        assert all_.dtype == torch.float64 and not all_.requires_grad
        torch.testing.assert_close(some, all_[[4, 1, 2]], atol=1e-6, rtol=1e-6, msg=m.name)


def test_psnr_and_ssim_against_pyiqa_and_skimage(group):
    import pyiqa
    from skimage.metrics import structural_similarity
    gt, sr = group
    theirs = pyiqa.create_metric("psnry", device="cpu")(sr, gt.expand_as(sr)).double()
    studio = 20*np.log10(255/219) # theirs has the luma on the full range
    torch.testing.assert_close(R.psnr_y(sr, gt, border=0), theirs + studio, atol=2e-3, rtol=0)
    y, y_gt = R.luma(sr)[:, 0, 4:-4, 4:-4].numpy(), R.luma(gt[None])[0, 0, 4:-4, 4:-4].numpy()
    wang = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)
    ssim = [structural_similarity(o, y_gt, **wang) for o in y]
    np.testing.assert_allclose(R.ssim_y(sr, gt, border=4), ssim, atol=1e-9)
    assert R.psnr_y(gt[None], gt, border=4).tolist() == [80.]
    assert R.luma(torch.ones(1, 3, 1, 1)).item() == pytest.approx(235)


def test_a_border_has_no_default(group):
    gt, sr = group
    for f in (R.psnr_y, R.ssim_y, R.lsd):
        with pytest.raises(TypeError, match="border"): f(sr, gt)
    for f in (R.psnr, R.ssim):
        with pytest.raises(TypeError, match="border.*channel"): f(sr, gt)
        for border in (-1, 32, 2.): # 32 leaves no pixel of 64
            with pytest.raises(ValueError, match=f"a border of {border}; a border is"): f(sr, gt, border, R.rgb)


def test_the_named_constants_keep_their_border_of_4_bit_for_bit(group):
    gt, sr = group
    for metric, f in ((R.PSNR_Y, R.psnr_y), (R.SSIM_Y, R.ssim_y), (R.LSD, R.lsd)):
        assert torch.equal(R.score(metric, sr, gt), f(sr, gt, border=4))
    known = { # as of the records, before there were other borders
        "psnr_y": [44.809392335420135, 25.1272653806701],
        "ssim_y": [0.9930731690848197, 0.6478894330411075], "lsd": [12.213251817957405, 27.582159799812015]}
    for m in (R.PSNR_Y, R.SSIM_Y, R.LSD):
        np.testing.assert_allclose(R.score(m, sr, gt)[[0, -1]], known[m.name], rtol=1e-12)


SPACES = {"studio": (dict(test_y_channel=True, color_space="ycbcr"), R.luma_studio, R.luma_studio_whole),
          "yiq": (dict(test_y_channel=True), R.luma_yiq, R.luma_yiq_whole),
          "rgb": (dict(test_y_channel=False), R.rgb, R.rgb)}

@pytest.mark.parametrize("border", [0, 4])
@pytest.mark.parametrize("space", SPACES)
def test_psnr_and_ssim_are_pyiqas(group, space, border):
    import pyiqa
    gt, sr = group
    sr = torch.cat([sr, 1-gt[None], gt[None]]) # the last two: against the photograph, and the same
    options, plain, whole = SPACES[space]
    def theirs(name):
        return pyiqa.create_metric(name, device="cpu", crop_border=border, **options)(sr, gt.expand_as(sr))
    torch.testing.assert_close(R.psnr(sr, gt, border, plain), theirs("psnr").double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(R.ssim(sr, gt, border, whole), theirs("ssim").double(),
                               atol=1e-4 if space == "yiq" else 1e-5, rtol=0) # YIQ has ties, which float32 breaks
    wrong = R.ssim(sr, gt, border, R.luma_yiq_whole if space == "studio" else R.luma_studio_whole)
    assert (wrong - theirs("ssim")).abs().max() > 1e-3


def test_scores_of_floats_are_not_rounded_to_8_bit(group):
    gt, sr = group
    sr = (sr + .3/255).clamp(0, 1)
    rounded = R.psnr(quantize(sr), gt, 0, R.luma_studio)
    assert (R.psnr(sr, gt, 0, R.luma_studio) - rounded).abs().max() > 1e-2
    torch.testing.assert_close(R.psnr_y(sr, gt, border=0), rounded, atol=2e-3, rtol=0) # this one rounds itself


# the answer sheet: 97 pictures whose values OSEDiff's authors logged

@pytest.fixture(scope="module")
def logged(root):
    "(set, row of the log, sr (1,3,H,W), gt (3,H,W)) of one picture after another; nothing is extracted"
    folder = root.parent/"shared/bench"
    if not (folder/"osediff_log.csv").is_file(): pytest.skip(f"the logged pictures are not at hand ({folder})")
    rows = pd.read_csv(folder/"osediff_log.csv")
    def read(tar, row, kind):
        with Image.open(tar.extractfile(f"{row.set}/{kind}/{row.file}")) as im:
            return torch.from_numpy(np.array(im)).permute(2, 0, 1).float()/255
    def pictures(step):
        with tarfile.open(folder/"osediff_half.tar") as tar:
            for row in rows[::step].itertuples(): yield row, read(tar, row, "osediff")[None], read(tar, row, "gt")
    assert len(rows) == 97
    return pictures


@pytest.mark.parametrize("step", [32, pytest.param(1, marks=pytest.mark.slow)])
def test_psnr_and_ssim_of_the_logged_pictures(logged, step):
    for row, sr, gt in logged(step):
        assert R.psnr(sr, gt, 0, R.luma_studio).item() == pytest.approx(row.psnr, abs=1e-4), row.file
        assert R.ssim(sr, gt, 0, R.luma_studio_whole).item() == pytest.approx(row.ssim, abs=1e-5), row.file


def test_each_other_choice_misses_the_logged_pictures(logged):
    misses = {}
    for row, sr, gt in logged(48):
        wrong = dict(p_border=R.psnr(sr, gt, 4, R.luma_studio), p_rounded=R.psnr(sr, gt, 0, R.luma_studio_whole),
                     p_yiq=R.psnr(sr, gt, 0, R.luma_yiq), p_rgb=R.psnr(sr, gt, 0, R.rgb),
                     s_border=R.ssim(sr, gt, 4, R.luma_studio_whole), s_plain=R.ssim(sr, gt, 0, R.luma_studio),
                     s_yiq=R.ssim(sr, gt, 0, R.luma_yiq_whole), s_rgb=R.ssim(sr, gt, 0, R.rgb))
        for k, v in wrong.items():
            off = abs(v.item() - (row.psnr if k[0] == "p" else row.ssim))
            misses[k] = max(misses.get(k, 0), off/(1e-4 if k[0] == "p" else 1e-5))
    assert len(misses) == 8 and min(misses.values()) > 2, misses


@pytest.mark.parametrize("step", [32, pytest.param(1, marks=pytest.mark.slow)])
def test_niqe_of_the_logged_pictures(logged, step):
    cropped, off = R.pyiqa_metric("niqe", crop_border=4), []
    for i, (row, sr, _) in enumerate(logged(step)):
        assert R.score(R.NIQE, sr).item() == pytest.approx(row.niqe, abs=.02), row.file
        if i < 4: off.append(abs(R.score(cropped, sr).item() - row.niqe))
    assert max(off) > .02


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_photograph_is_embedded_once(group, net):
    from stlpips_pytorch.stlpips import LPIPS
    gt, sr = group
    package, seen = LPIPS(net=net, variant="shift_tolerant", verbose=False), []
    package.scaling_layer.register_forward_hook(lambda module, x, out: seen.append(len(out)))
    with torch.inference_mode():
        theirs = package(sr, gt.expand_as(sr), normalize=True).flatten().double()
        seen.clear()
        ours = R._deep_distance(package)(sr, gt)
    assert sum(seen) == len(sr)+1
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_scorer_equals_the_package(group, net): # a random backbone: the real one must be downloaded
    from lpips import LPIPS
    gt, sr = group
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        package = LPIPS(net=net, pnet_rand=True, verbose=False)
    with torch.inference_mode():
        theirs = package(sr, gt.expand_as(sr), normalize=True).flatten().double()
        torch.testing.assert_close(R._deep_distance(package)(sr, gt), theirs, atol=1e-6, rtol=0)


# metrics that cannot be had

@pytest.mark.parametrize("metric", [*R.DP2O.metrics, R.LPIPS_ALEX, R.LPIPS_VGG], ids=lambda m: m.name)
def test_unavailable_says_what_to_do_and_asks_no_server(offline, metric, monkeypatch):
    from huggingface_hub import constants
    def state():
        return (socket.getaddrinfo, socket.getdefaulttimeout(), constants.HF_HUB_OFFLINE,
                logging.root.manager.disable)
    asked, naps = [], []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: asked.append(host) or R._no_names(host))
    monkeypatch.setattr(time, "sleep", naps.append) # a hub that is asked again and again pauses in between
    before = state()
    with pytest.raises(R.MetricUnavailable) as e: R.check_available([R.PSNR_Y, metric])
    assert asked == naps == [] and before == state()
    for part in (metric.name, "Tried", "downloaded once", "`offline`"): assert part in str(e.value)


def test_offline_preset_needs_nothing(offline, capfd):
    state = torch.get_rng_state()
    R.check_available(R.OFFLINE.metrics, size=(64, 80))
    assert torch.equal(state, torch.get_rng_state())
    assert "Setting up" not in capfd.readouterr().out
    assert {m.kind for m in R.OFFLINE.metrics} == {"fr", "nr"} and R.ST_LPIPS_ALEX in R.OFFLINE.fr
    assert not {R.ST_LPIPS_VGG, R.CVVDP, R.PSNR_Y, R.SSIM_Y} & set(R.OFFLINE.metrics)


def test_damaged_file_does_not_pass_for_a_metric(offline):
    path = offline/"hub/checkpoints/alexnet-owt-7be5be79.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a download")
    with pytest.raises(R.MetricUnavailable, match="delete a damaged file"): R.check_available([R.LPIPS_ALEX])
    path.unlink()
    with pytest.raises(R.MetricUnavailable, match="URLError"): R.check_available([R.LPIPS_ALEX]) # not remembered


def test_a_metric_that_cannot_score_this_size_is_found_before_sampling():
    R.check_available([R.SSIM_Y], size=(32, 40))
    for metric, size in ((R.SSIM_Y, (16, 40)), (R.MS_SSIM, (32, 32))):
        with pytest.raises(ValueError, match=f"{metric.name} cannot score images of {re.escape(str(size))}"):
            R.check_available([metric], size=size)


def test_silent_server_is_not_waited_for():
    "It would be for ever"
    silent = socket.socket()
    silent.bind(("127.0.0.1", 0))
    silent.listen(1)
    assert not R._answers(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=.5)
    silent.close()


def test_slow_name_lookup_is_not_waited_for(monkeypatch):
    "Waited for, it would have ended as an answer"
    release = threading.Event()
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: release.wait(30))
    assert not R._answers("http://name.that.hangs.invalid", seconds=.5)
    release.set()


def test_both_servers_are_asked_at_once(monkeypatch):
    "Where neither answers, a process waits once"
    both = threading.Barrier(2, timeout=5)
    monkeypatch.setattr(R, "_answers", lambda url: both.wait() < 0)
    with R._bounded_network(): assert socket.getaddrinfo is R._no_names


def test_without_metric_packages(root, clean_env):
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('pyiqa','lpips','stlpips_pytorch','pycvvdp','torchvision','huggingface_hub'):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import torch
from srnb import rewards as R
x = torch.rand(2, 3, 32, 32)
R.score_group((R.PSNR_Y, R.SSIM_Y), x, x[0])
for m in (R.ST_LPIPS_ALEX, R.LPIPS_VGG, R.CVVDP, R.PIQE):
    try: R.check_available([m])
    except R.MetricUnavailable as e: print(e)
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, env=clean_env, capture_output=True, text=True,
                         check=True)
    for name in ("stlpips-pytorch", "lpips", "cvvdp", "pyiqa"): assert f"`pip install {name}`" in ran.stdout


# the papers' metrics by name

NAMES = ("lpips", "lpips-vgg", "dists", "topiq_fr", "afine_fr", "niqe", "brisque", "ilniqe", "pi", "musiq", "maniqa",
         "maniqa-pipal", "clipiqa", "clipiqa+", "topiq_nr", "afine_nr", "qalign")

def test_the_papers_metrics_are_judges_by_name():
    from srnb.config import constants, record, revive
    from srnb.runs import Judging
    there = constants(R.Metric)
    assert {*NAMES} <= {*there} and all(there[n].name == n for n in NAMES)
    judging = Judging("dp2o", judges=["psnr_y", *NAMES])
    assert record(judging)["judges"] == ["psnr_y", *NAMES]
    assert revive(Judging, record(judging)) == judging
    with pytest.raises(ValueError, match="did you mean 'musiq'"): Judging(None, judges=["muziq"])


def test_any_other_id_is_a_metric_of_a_file(tmp_path):
    from srnb.runs import Judging
    (tmp_path/"my.py").write_text("from srnb.rewards import pyiqa_metric\n"
                                  "MINE = pyiqa_metric('cw_ssim')\nCROPPED = pyiqa_metric('psnr', crop_border=4)\n")
    mine, cropped = Judging(None, judges=[f"{tmp_path}/my.py:MINE", f"{tmp_path}/my.py:CROPPED"]).judges
    assert (mine.name, mine.kind, mine.higher_better) == ("cw_ssim", "fr", True)
    assert cropped.name == "psnr(crop_border=4)" and cropped != R.pyiqa_metric("psnr")
    with pytest.raises(R.MetricMismatch, match="no metric 'musik'; did you mean 'musiq'"): R.pyiqa_metric("musik")


def test_kind_and_direction_are_read_without_importing_pyiqa(root, clean_env):
    code = """
import sys
from srnb.rewards import pyiqa_metric
m = pyiqa_metric("ahiq"), pyiqa_metric("dbcnn"), pyiqa_metric("msswd")
assert [(o.kind, o.higher_better) for o in m] == [("fr", True), ("nr", True), ("fr", False)]
assert "pyiqa" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], cwd=root, env=clean_env, check=True)


def test_options_and_files_that_a_metric_does_not_take_are_told(tmp_path, offline):
    for m, said in ((R.pyiqa_metric("niqe", border=4), "niqe takes no option 'border'"),
                    (R.pyiqa_metric("gmsd", crop=4), "gmsd takes no option 'crop'"),
                    (R.pyiqa_metric("psnr", colour_space="ycbcr"), "psnr takes no option 'colour_space'")):
        with pytest.raises(R.MetricMismatch, match=said): R.scorer_of(m)
    pickled, whole = tmp_path/"pickled.pth", tmp_path/"whole.pth"
    torch.save({"params": Placed([])}, pickled)
    whole.write_bytes(b"half a download")
    for file, said in ((tmp_path/"none.pth", "there is no file .*none.pth, given as the weights of musiq"),
                       (pickled, "pickled.pth, given as the weights of musiq, holds more than tensors"),
                       (whole, "whole.pth, given as the weights of musiq, holds more than tensors or is damaged")):
        with pytest.raises(R.MetricUnavailable, match=said): R.scorer_of(R.pyiqa_metric("musiq", weights=file))
    with pytest.raises(R.MetricMismatch, match="ssim takes no file of weights"):
        R.scorer_of(R.pyiqa_metric("ssim", weights=R.niqe_parameters))


def test_a_local_file_of_weights_is_used(tmp_path, group, offline):
    from pyiqa.archs.cnniqa_arch import CNNIQA
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = CNNIQA(pretrained=None).eval()
    torch.save({"params": net.state_dict()}, tmp_path/"mine.pth")
    metric = R.pyiqa_metric("cnniqa", weights=tmp_path/"mine.pth")
    assert "mine.pth" in metric.needs and "huggingface" not in metric.needs
    with torch.no_grad(): theirs = net(group[1]).flatten().double()
    torch.testing.assert_close(R.score(metric, group[1]), theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("metric,file", [
    (R.MUSIQ, "musiq_koniq_ckpt-e95806b9.pth"), (R.LPIPS_ALEX, "alexnet-owt-7be5be79.pth"),
    (R.ILNIQE, "ILNIQE_templateModel.mat")], ids=lambda o: getattr(o, "name", ""))
def test_the_missing_file_and_its_folder_are_named(offline, metric, file):
    with pytest.raises(R.MetricUnavailable) as e: R.check_available([metric])
    assert f"metric {metric.name} cannot be built" in str(e.value)
    assert f"The file is {file}, expected in" in str(e.value)


def test_what_a_metric_was_computed_with():
    from importlib.metadata import version
    assert R.MUSIQ.version == f"pyiqa {version('pyiqa')}" and R.CVVDP.version == f"cvvdp {version('cvvdp')}"
    assert R.LPIPS_VGG.version == f"lpips {version('lpips')}" and R.PSNR_Y.version.startswith("srnb ")
    assert A.version == "" and replace(A, needs="package srnb-that-is-not-there").version == ""


def test_niqe_and_brisque_need_no_network(offline):
    assert not {"huggingface", "download"} & {*f"{R.NIQE.needs} {R.BRISQUE.needs}".split()}
    photos = torch.stack([centre_crop(p.read(), 256) for p in embedded_photos()[:2]])
    for m in (R.NIQE, R.BRISQUE):
        values = R.check_repeats(m, photos, atol=.01)
        assert values.isfinite().all() and 0 < values.abs().max() < 100
    from pyiqa import create_metric
    for given, m in ((R.niqe_parameters, R.NIQE), (R.brisque_parameters, R.BRISQUE)):
        theirs = create_metric(m.name, device="cpu", pretrained_model_path=str(given(offline)))(photos)
        torch.testing.assert_close(R.score(m, photos), theirs.double().flatten(), atol=1e-6, rtol=1e-6)


def test_the_shipped_parameters_carry_their_notice(root):
    import hashlib
    for name, start in (("niqe", "4222f92fe767b41b"), ("brisque", "18acf32b2de874cb")):
        notice = (root/f"srnb/weights/metrics/LICENSE-{name}.txt").read_text()
        for part in ("COPYRIGHT NOTICE STARTS WITH THIS LINE", "The University of Texas at Austin",
                     "COPYRIGHT NOTICE ENDS WITH THIS LINE"): assert part in notice
        held = (root/f"srnb/weights/metrics/{name}.safetensors").read_bytes()
        assert hashlib.sha256(held).hexdigest().startswith(start)


# the same picture, the same number

def test_a_metric_that_draws_or_looks_at_its_neighbours_does_not_repeat():
    def metric(f): return R.Metric("x", "nr", True, lambda: f)
    def crops(draw): return metric(lambda sr, gt: torch.stack([s[:, draw():].mean() for s in sr]))
    R.check_repeats(R.SSIM_Y)
    for draw in (lambda: np.random.randint(0, 99), lambda: int(torch.randint(0, 99, ())),
                 lambda: __import__("random").randrange(99)):
        with pytest.raises(ValueError, match=r"x \(no version known\) gave picture 0 .* scored again"):
            R.check_repeats(crops(draw))
    def seeded(sr, gt): # reseeding hides it from the first test: the value depends on the order
        np.random.seed(123)
        return torch.stack([s[:, np.random.randint(0, 99):].mean() for s in sr])
    with pytest.raises(ValueError, match="scored in another order"): R.check_repeats(metric(seeded))
    with pytest.raises(ValueError, match="at least 2"): R.check_repeats(R.SSIM_Y, torch.rand(1, 3, 64, 64))


def test_scoring_and_building_leave_the_random_state(group):
    import random
    def reseed():
        random.seed(123)
        np.random.seed(123)
        torch.manual_seed(123)
    def build():
        reseed()
        return lambda sr, gt: reseed() or sr.mean((1, 2, 3))
    metric = R.Metric("reseeds", "nr", True, build)
    def state(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    before = state()
    R.score(metric, group[1])
    R.check_repeats(metric)
    with pytest.raises(ZeroDivisionError):
        R.score(R.Metric("breaks", "nr", True, lambda: lambda sr, gt: reseed() or 1/0), group[1])
    assert state() == before


# LPIPS that proves itself

@pytest.mark.parametrize("net", ["alex", pytest.param("vgg", marks=pytest.mark.slow), "squeeze"])
def test_a_backbone_is_told_by_its_digest(tmp_path, group, net, monkeypatch, offline):
    import hashlib

    import torchvision.models as tv
    from lpips import LPIPS
    name = dict(alex="alexnet", vgg="vgg16", squeeze="squeezenet1_1")[net]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random_ = getattr(tv, name)(weights=None)
    random_.classifier = torch.nn.Identity() # up to half a gigabyte that LPIPS does not look at
    file = tmp_path/R._BACKBONE[net][1]
    torch.save(random_.state_dict(), file)
    with pytest.raises(R.MetricUnavailable, match="is not torchvision's .*: its SHA-256 begins with"):
        R.scorer_of(R.lpips_metric(net, file))
    hub = offline/"hub/checkpoints"
    hub.mkdir(parents=True)
    (hub/file.name).symlink_to(file) # nor does it pass where torchvision would look
    with pytest.raises(R.MetricUnavailable, match="is not torchvision's"): R.scorer_of(R.lpips_metric(net))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8] # as if it were the one
    monkeypatch.setitem(R._BACKBONE, net, (name, f"{name}-{digest}.pth"))
    package = LPIPS(net=net, pnet_rand=True, verbose=False)
    slices = {k: random_.state_dict()[f"features.{k.partition('.')[2]}"] for k in package.net.state_dict()}
    package.net.load_state_dict(slices)
    gt, sr = group
    with torch.inference_mode(): theirs = package(sr, gt.expand_as(sr), normalize=True).flatten().double()
    metric = R.lpips_metric(net, file)
    torch.testing.assert_close(R.score(metric, sr, gt), theirs, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="0.1024 and 0.0938.*not the published"): R.prove_lpips(metric)


def test_the_published_values_prove_lpips():
    g = torch.Generator().manual_seed(42)
    a, b = (torch.rand(2, 3, 100, 100, generator=g)*2 - 1 for _ in range(2))
    known = {round(float((a[i]-b[i]).square().mean()), 6): v for i, v in enumerate((.10242, .09378))}
    right = R.Metric("right", "fr", False, lambda: lambda sr, gt: torch.tensor(
        [known[round(float((2*sr[0]-2*gt).square().mean()), 6)]]))
    np.testing.assert_allclose(R.prove_lpips(right), [.10242, .09378])
    swapped = replace(right, build=lambda: lambda sr, gt: .19620 - right.build()(sr, gt))
    with pytest.raises(ValueError, match="gives 0.0938 and 0.1024"): R.prove_lpips(swapped)
    with pytest.raises(ValueError, match="no backbone 'resnet'; there is alex, vgg, squeeze"): R.lpips_metric("resnet")


# without pyiqa

def test_without_pyiqa_everything_but_its_metrics_works(root, clean_env, tmp_path, tiny):
    "Rooms import, a run is judged by PSNR, the command says its help; a metric of pyiqa says what to install"
    code = f"""
import importlib, pathlib, sys
from dataclasses import replace
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'pyiqa': raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
for o in sorted(pathlib.Path({str(root)!r}, "srnb").glob("[a-z]*.py")): importlib.import_module(f"srnb.{{o.stem}}")
from srnb import rewards as R
for make in (R.MUSIQ, "dbcnn", R.NIQE):
    try: R.check_available([R.pyiqa_metric(make) if isinstance(make, str) else make])
    except R.MetricUnavailable as e: print(e)
from srnb.align import DP2O, Run, Top, align
from srnb.core import read_run
from srnb.runs import Base, Data, Judging
from srnb.training import Loop
few = Loop(steps=1, lr=1e-3, warmup=1, save_every=1, log_every=1)
reward = R.Reward("psnr", fr=(R.PSNR_Y,))
run = Run({str(tmp_path/"run")!r}, replace(DP2O, winners=Top(1)), Data(size=64, places=1, take=2),
          Base({str(tiny)!r}, precision="no", sample_steps=1), Judging(reward, m=2, judges=("psnr_y",), eval_m=1), few,
          rank=2, batch=1, patch=32)
assert "psnr_y" in set(read_run(align(run))[1].metric)
from srnb.command import main
assert main(["upscale", "--help"]) == 0
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, env=clean_env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    said = [o for o in ran.stdout.splitlines() if o.startswith("metric ")]
    assert [o.split()[1] for o in said] == ["musiq", "dbcnn", "niqe"]
    for o in said:
        assert "needs the package pyiqa (PolyForm-Noncommercial" in o and "`pip install pyiqa` provides it" in o


# the ladder

def test_ladder_rule():
    good = dict(zip(R.LADDER, [10, 9, 5, 8, 4, 7, 1, 2], strict=True))
    def check(**change): R.check_ladder(pd.DataFrame([good | change], index=["b"]), B)
    check()
    check(bicubic4=9.9)
    for change, said in [
        (dict(jpeg10=9), "jpeg50 is not above jpeg10"), (dict(noise30=8.5), "noise10 is not above noise30"),
        (dict(blur3=7.5), "blur1 is not above blur3"), (dict(bicubic4=10), "gt is not above bicubic4")]:
        with pytest.raises(ValueError, match=said): check(**change)
    with pytest.raises(ValueError, match="gave nan"): check(blur1=float("nan"))
    with pytest.raises(ValueError, match="at least 8 photographs"): R.ladder_table([B], [torch.zeros(3, 32, 32)]*7)
    with pytest.raises(ValueError, match="multiples of 4"): R.ladder_images(torch.zeros(3, 30, 32))


@pytest.mark.parametrize("size", [192, pytest.param(256, marks=pytest.mark.slow)])
def test_offline_preset_passes_the_ladder(size):
    photos = [centre_crop(p.read(), size).contiguous() for p in embedded_photos()[:8]]
    table = R.ladder_table(R.OFFLINE.metrics, photos)
    for m in R.OFFLINE.metrics: R.check_ladder(table, m)


# devices

@pytest.fixture
def scorers():
    "Built anew, and gone afterwards: their models have been elsewhere"
    R.drop_scorers()
    yield R.scorer_of
    R.drop_scorers()


OURS = (R.PSNR_Y, R.SSIM_Y, R.LSD)

@pytest.mark.parametrize("metric", [*OURS, R.PIQE, R.GMSD, R.NLPD, R.MS_SSIM, R.FSIM, R.VSI],
                         ids=lambda m: m.name)
def test_a_metric_computes_on_a_gpu_that_is_not_there(scorers, monkeypatch, metric):
    "Fake tensors know shapes and devices alone; what mixes two devices is an error"
    from pyiqa.models.inference_model import InferenceModel
    from torch._subclasses.fake_tensor import FakeTensorMode
    monkeypatch.setattr(InferenceModel, "is_valid_input", lambda self, x: None) # looks at numbers
    scorer = scorers(metric)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        sr, gt = torch.rand(3, 3, 192, 192, device="cuda"), torch.rand(3, 192, 192, device="cuda")
        values = scorer(sr, gt if metric.kind == "fr" else None)
    assert values.device.type == "cuda" and values.shape == (3,)


@pytest.mark.parametrize("metric", [*OURS, R.ST_LPIPS_ALEX, R.ST_LPIPS_VGG], ids=lambda m: m.name)
def test_a_model_follows_its_images(scorers, metric):
    images = torch.rand(3, 3, 64, 80, device="meta")
    with torch.inference_mode(): assert scorers(metric)(images, images[0]).is_meta


def test_colorvideovdp_is_made_once_on_every_device(scorers, monkeypatch):
    made = []
    class Model:
        def __init__(self, display_name, heatmap, quiet, device): made.append((display_name, device.type))
        def predict(self, s, gt, dim_order): return s.mean(), None
    monkeypatch.setattr("pycvvdp.cvvdp", Model)
    images = torch.rand(3, 3, 64, 80)
    for device in ("cpu", "meta", "meta", "cpu"):
        assert scorers(R.CVVDP)(images.to(device), images[0].to(device)).device.type == device
    assert made == [("standard_4k", "cpu"), ("standard_4k", "meta")]


class Placed(torch.nn.Module):
    "A model that says where it was sent"
    def __init__(self, at):
        super().__init__()
        self.sent = at

    def to(self, device):
        self.sent.append(str(device))
        return self


def test_scores_come_from_the_device_that_was_named(scorers, group):
    "Models follow the images, leave the device when they are parked, and memory when they are dropped"
    (gt, sr), sent, seen, gone = group, [], [], []
    def build():
        model = Placed(sent)
        gone.append(weakref.ref(model))
        def scorer(sr, gt):
            R._at(model, sr)
            seen.append((sr, gt))
            return torch.arange(len(sr)) # there are no numbers on that device
        return scorer
    metrics = [R.Metric(n, "fr", True, build) for n in "ab"]
    scores = R.score_group(metrics, sr, gt, "meta")
    assert all(v.tolist() == [0, 1, 2, 3, 4, 5] and v.device.type == "cpu" for v in scores.values())
    assert sent == ["meta"]*2 and all(o.is_meta for pair in seen for o in pair)
    R.check_available(metrics, (32, 40), "meta")
    assert len(gone) == 2 and seen[-1][0].is_meta
    R.park_scorers()
    assert sent[-2:] == ["cpu"]*2 and all(o() is not None for o in gone)
    R.drop_scorers()
    assert all(o() is None for o in gone)
    R.score_group(metrics, sr, gt)
    assert len(gone) == 4 and sent[-1] == "cpu"

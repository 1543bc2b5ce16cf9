"Every kind of run: what each field changes, what is judged and trained on, and how `fit` moves a weight"
import functools
import gc
import hashlib
import json
import math
import pickle
import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pandas as pd
import peft
import pytest
import torch
from safetensors.torch import load_file

from srnb import core, data
from srnb.adversary import adversary_loser
from srnb.align import Method, cost
from srnb.baselines import BASELINES
from srnb.config import fill, leaves, record
from srnb.core import bicubic, check_close, generator, to_pil
from srnb.curation import finished_groups, group_seeds, hpo_weights, read_group, top_bottom
from srnb.data import embedded_photos, find_photos, make_pair
from srnb.degrade import RESSHIFT_TEST, SEESR
from srnb.nets import OneStepConfig, OneStepUNet, RRDBConfig, RRDBNet, SmallUNet, UNetConfig
from srnb.onestep import CTMSRRun, Match, evaluate_base, onestep_loss
from srnb.pairs import Draw, Logistic, draw_loss, split_backward
from srnb.paths import SAMPLERS, VPV, Shift
from srnb.policies import PixelCodec, Policy, from_pretrained, load_adapter, save_adapter, save_pretrained
from srnb.rewards import (PIQE, PSNR_Y, ST_LPIPS_ALEX, ST_LPIPS_VGG, GlobalBounds, GroupMinMax, Reward, hybrid,
                          score_group)
from srnb.runs import Data, record_of
from srnb.spectral import SobolevEnergy, l2_energy
from srnb.train import from_json, presets, train
from srnb.training import Loop, fit, latest_checkpoint

# ---------------------------------------------------------------- the kinds of run, small

FEW = dict(steps=2, lr=1e-2, warmup=1, decay=0., save_every=2, log_every=1, keep_every=0, ema=0.)


def below(path, values): return {f"{path}.{k}": v for k, v in values.items()}


def aligned(w):
    photos = {"data.photos": (w["train"],), "data.held_out": (w["held"],), "data.size": 64, "data.places": 1}
    base = {"base.backbone": w["tiny"], "base.precision": "no", "base.sample_steps": 2}
    judging = {"judging.m": 4, "judging.reward": None, "judging.judges": ("psnr_y",), "judging.eval_m": 2}
    return photos | base | judging | dict(rank=2, batch=1, patch=32) | below("loop", FEW)


def by_reward(w): return aligned(w) | {"judging.reward": "offline_nr", "method.winners.n": 2, "method.link.kappa": 10.}


def voted(w): return aligned(w) | {"method.losers.folder": w["votes"], "method.link.kappa": 10.}


def imitated(w):
    losers = {"method.losers.outputs": ("bicubic", "base"), "method.losers.adversary_rank": 3}
    loops = below("method.losers.imitation", FEW) | below("method.start.start_loop", FEW)
    return aligned(w) | losers | loops | {"method.link.kappa": 100.}


def online(w):
    losers = below("method.losers", dict(every=2, capacity=4, refresh=2, cells=2))
    return aligned(w) | losers | {"method.link.gate": 1., "loop.steps": 3, "batch": 2}


def rated(w): return aligned(w) | {"judging.reward": "offline_nr", "method.losers.k": 3}


def fresh(w):
    losers = below("method.losers", dict(crops=1, every=1, decay=.6, ramp=.4))
    return rated(w) | losers | {"loop.steps": 3, "method.winners.frozen": False}


def patches(w):
    return dict(photos=(w["train"],), degradation="resshift_test", versions=1, max_side=112, patch=32, batch=2,
                precision="no") | below("loop", FEW)


def small_net(w):
    return patches(w) | below("net", dict(channels=(16, 16), blocks=(1, 1), emb=16, mean_channels=8, mean_blocks=1))


def matched(w):
    return patches(w) | dict(held_out=(w["held"],), window=24, size=64, eval_m=2, judges=("psnr_y",)) | below(
        "match.match_loop", FEW)


def distilled(w):
    crops = below("crops", dict(side=64, first=2, fresh=3, every=1, most=5, clean=.1, mild=.3))
    pull = dict(l1=1., lpips=.3, lattice=.5, flat=.5)
    pulls = below("to_teacher", pull) | below("to_truth", pull)
    return patches(w) | crops | pulls | dict(degradation="resshift_train", versions=0, patch=40, margin=4, window=32,
                                             teacher=w["onestep"], init=w["restorer"])


def one_step(w): return matched(w) | below("net", dict(channels=(16, 16), blocks=(1, 1), emb=16, tail=8))


GIVEN = {"method.losers": {"is": "Given", "outputs": ["bicubic", "base"]}, "method.start": None}
SETTINGS = dict( # name -> preset, the choices that make another method of it, how it is made small
    dp2o=("dp2o", {}, by_reward), asasr=("asasr", {}, imitated), dro=("dro", {}, online), dpo=("dpo", {}, aligned),
    nft=("nft", {}, rated), nft_online=("nft_online", {}, fresh), dgpo=("dgpo", {}, rated), crd=("crd", {}, rated),
    votes=("votes", {}, voted),
    sft=("sft", {}, aligned), base=("base", {}, small_net), ctmsr=("ctmsr", {}, one_step),
    distil=("distil", {}, distilled),
    braked=("dp2o", {"brake": {"alpha": .5, "look_m": 2}}, by_reward),
    given=("asasr", GIVEN, lambda w: aligned(w) | {"method.link.kappa": 100.}),
    riesz=("asasr", {"method.losers": {"is": "Riesz", "radius": .05}, "method.start": None},
           lambda w: aligned(w) | {"method.link.kappa": 100.}),
    expert=("dro", {"method.winners": {"is": "Expert", "n": 2}},
            lambda w: online(w) | {"judging.reward": "offline_fr"}),
    gated=("sft", {"method.link": {"is": "Hinge", "gate": 1.}}, aligned),
    warm=("base", {}, lambda w: patches(w) | dict(init=w["tiny"])),
    continued=("ctmsr", {}, lambda w: matched(w) | dict(init=w["onestep"])))
PRESETS = [n for n, o in SETTINGS.items() if n == o[0]]
ALIGNED = [n for n in SETTINGS if n not in ("base", "ctmsr", "distil", "warm", "continued")]
ONE = {"method.winners.n": 1, "method.losers.intra": False, "method.losers.inter": False} # one pair, of weight 1


def shape(setting):
    "A setting as it is before it is made small"
    preset, choices, _ = SETTINGS[setting]
    return fill(presets()[preset][1], choices)


def paths_of(setting): # of its fields; a dataclass that is no choice is what is below it
    return [path for path, (kind, _) in leaves(shape(setting)).items() if not is_dataclass(kind)]


# ---------------------------------------------------------------- another value of every field

def given(name): return lambda w, run: w[name]
def folder(name): return lambda w, run: (w[name],)


def four_updates(w, run):
    "A budget that pays for four updates, on two crops"
    before, update = cost(run, 2, run.base.sample_steps)
    return math.ceil(before+4*update)


def looped(path, weights, log, kept, large=()):
    """Fields of a loop, and where they show; `large`: what gives it 4,096 weights in one tensor, which 8 bits need. How
    often it saves is seen where one is stopped, see `fit` below; where it logs changes no result"""
    other = dict(steps=(4, log), lr=(2e-2, weights), warmup=(2, weights), decay=(.9, weights), parts=(2, weights),
                 weight_decay=(.5, weights), clip=(1e-3, weights), ema=(.9, weights), save_every=(1, ""),
                 log_every=(2, log), keep_every=(1, kept), optimiser=("adamw_8bit", weights.split()[0], dict(large)),
                 log_with=("none", ""))
    return below(path, other)


# path -> another value, or what gives one from the folders and the run; what must differ then ("!": it is refused);
# what else the run needs so that the field decides something
SOBOLEV = {"method.energy.s": 1.5}
NONE = "!options are for a backbone"
OTHER = "!BaseRun.options is for a backbone"
EVERY = { # of every Run
    "method.energy.s": (.7, "log"), "method.energy.frequency": ("radian", "log", SOBOLEV),
    "method.energy.unit_mean": (False, "log", SOBOLEV), "method.energy.mean": (False, "log"),
    "method.start": ({"start_loop": FEW}, "reference before log adapter"), "method.safeguard": (True, "log"),
    "method.link.kappa": (20., "log"),
    "data.photos": (folder("others"), "bank adapter"), "data.held_out": (folder("others_held"), "before after metrics"),
    "data.degradation": ("seesr", "bank before after"), "data.size": (80, "bank before after"),
    "data.places": (2, "bank adapter"), "data.take": (1, "bank before adapter"),
    "data.prompts": (given("prompts"), "!prompts must be empty"),
    "base.backbone": (given("tiny2"), "bank before after metrics"), "base.path": ("vp_eps", "bank before after log"),
    "base.precision": ("bf16", "before after adapter"), "base.sampler": ("ab2", "bank before after"),
    "base.sample_steps": (3, "bank before after"),
    "base.colour.fix": ("wavelet", "bank before after metrics"),
    "base.colour.strength": (.5, "bank before after", {"base.colour.fix": "adain"}),
    "base.colour.linear": (True, "bank before after", {"base.colour.fix": "adain"}), "base.sample_batch": (2, ""),
    "base.adapter": (given("adapter"), "before log adapter"),
    "base.options.control": ("folder", NONE), "base.options.train": ("control", NONE),
    "base.options.guidance": (2., NONE), "base.options.negative": ("noise", NONE),
    "base.options.control_scale": (.5, NONE), "base.options.max_tokens": (77, NONE),
    "base.options.texts": ("folder", NONE), "base.options.prediction": ("epsilon", NONE),
    "base.options.checkpointing": (True, NONE), "base.options.tile_vae": (True, NONE),
    "base.options.levels": ("shifted", NONE),
    "base.options.variant": ("fp16", NONE), "base.options.quantize": ("4bit", NONE),
    "base.options.offload_vae": (True, NONE), "base.options.attention": ("flash", NONE),
    "base.options.compile": (True, NONE),
    "judging.reward": ("offline_nr", "bounds metrics"), "judging.m": (5, "samples", {"judging.reward": "offline_nr"}),
    "judging.judges": (("ssim_y",), "metrics"), "judging.eval_m": (3, "before after metrics"),
    "judging.show": (1, ""),
    "judging.blind": (given("wild"), "blind blind-before blind-after", {"judging.judges": ("psnr_y", "piqe")}),
    "rank": (3, "adapter"), "batch": (3, "log adapter"), "patch": (24, "log adapter"), "seed": (1, "log adapter"),
    "budget": (four_updates, "log adapter kept"), "rows": (1, "log", {"batch": 3}),
    "rounds": (2, "!a round draws a bank of its own"),
    "drift": (1e-9, "drift matched-adapter bank-matched metrics", {"loop.keep_every": 1}),
    "brake": ({"alpha": .5, "look_m": 2}, "look looks", {"judging.reward": "offline_nr"}),
    } | looped("loop", "adapter", "log", "kept drift", dict(rank=32))
PATCHES = dict( # of a network trained from patches
    photos=(folder("others"), "log policy"), degradation=("seesr", "log policy"), versions=(2, "log policy"),
    max_side=(64, "log policy"), patch=(24, "log policy"), batch=(3, "log policy"), seed=(1, "log policy"),
    precision=("bf16", "log policy"), init=(given("tiny"), "!leave net out")
    ) | below("net", dict(channels=((16, 32), "policy"), blocks=((1, 2), "policy"), emb=(32, "policy")))
PULL = {k: (v, "log policy") for k, v in dict(l1=.5, lpips=.8, lattice=3., flat=9.).items()}
RATED = { # whose code is that of nft
    "method.winners": ({"is": "Top", "n": 2}, "!lose to Rated"),
    "method.winners.how.overall": (lambda w, run: not run.method.winners.how.overall, "log"),
    "method.winners.how.clip": (.3, "log adapter"),
    "method.winners.frozen": (lambda w, run: not run.method.winners.frozen, "log"),
    "method.losers": ({"is": "Fresh", "k": 3, "crops": 1}, "log adapter"), "method.losers.k": (2, "log adapter"),
    "method.link": ({"is": "DGPO", "kappa": 10.}, "log"), "method.link.beta": (2., "log"),
    "method.link.adaptive": (True, "log"), "method.link.full": (.5, "log adapter"),
    "method.safeguard": (True, "!rated candidates are not parted"),
    "judging.reward": ("offline_fr", "log metrics")}
OWN = { # of one setting
    "dp2o": {
        "method.winners": ({"is": "Expert", "n": 2}, "!Bottom lose to Top"),
        "rounds": (2, "round adapter metrics"), "base.adapter": (given("adapter"), "bank before log adapter metrics"),
        "method.winners.n": (1, "log adapter"), "method.winners.frozen": (True, "log"),
        "method.winners.scale": ({"is": "GroupRank"}, "log"),
        "method.losers": ({"is": "Own", "cells": 2}, "log adapter"), "method.losers.intra": (False, "log"),
        "method.losers.inter": (False, "log"), "method.losers.tracked": (True, "log adapter"),
        "method.losers.pairs": (given("pairs"), "log adapter"),
        "method.link": ({"is": "Hinge", "gate": 1.}, "log"), "method.link.kappa": (20., "log"),
        "method.safeguard": (True, "log adapter"), "judging.reward": ("offline_fr", "bounds log metrics")},
    "asasr": {
        "method.winners": ({"is": "Top", "n": 2}, "!Adversary lose to Photograph"),
        "base.adapter": (given("adapter"), "!is the reference, and so would be what Method.start trains"),
        "method.losers": ({"is": "Riesz"}, "log adapter"), "method.losers.lam": (.1, "log adapter"),
        "method.losers.outputs": (("base", "bicubic"), "bank adversary adapter"),
        "method.losers.adversary_rank": (4, "adversary log"), "method.link": ({"is": "Hinge", "gate": 1.}, "log"),
        "method.link.kappa": (200., "log"), "method.start": (None, "before log adapter"),
        "method.energy.frequency": ("radian", "log adapter"), "method.energy.unit_mean": (False, "log"),
        "rank": (3, "reference adapter"),
        "batch": (3, "reference adversary log"), "patch": (24, "reference adversary log"),
        "seed": (1, "adversary log adapter")
        } | looped("method.losers.imitation", "adversary adapter", "adversary", "adversary",
                   {"method.losers.adversary_rank": 32})
          | looped("method.start.start_loop", "reference before adapter", "reference", "reference", dict(rank=32)),
    "dro": {
        "method.winners": ({"is": "Top", "n": 2}, "log adapter", {"judging.reward": "offline_nr"}),
        "data.take": (1, "before adapter", {"loop.steps": 6}),
        "method.losers": ("Samples", "log adapter"), "method.losers.every": (1, "log"),
        "method.losers.capacity": (2, "log"), "method.losers.refresh": (1, "log"), "method.losers.cells": (3, "log"),
        "method.link": ("Logistic", "log"), "method.link.gate": (2., "log")},
    "dpo": {
        "method.winners": ({"is": "Top", "n": 2}, "!Samples lose to Photograph", {"judging.reward": "offline_nr"}),
        "rounds": (2, "round adapter metrics"),
        "method.losers": ({"is": "Given", "outputs": ["bicubic"]}, "log adapter"),
        "method.link": ({"is": "Hinge", "gate": 1.}, "log")},
    "votes": { # the run's photographs are for judging alone: people have seen others
        "method.winners": ({"is": "Top", "n": 2}, "!Voted lose to Preferred", {"judging.reward": "offline_nr"}),
        "method.losers": ("Samples", "!Samples lose to Photograph"),
        "method.losers.folder": (given("votes2"), "log adapter"),
        "method.link": ({"is": "Hinge", "gate": 1.}, "log"), "data.photos": (folder("others"), ""),
        "data.places": (2, ""), "data.take": (1, "before")},
    "sft": {
        "method.winners": ({"is": "Top", "n": 2}, "log adapter", {"judging.reward": "offline_nr"}),
        "method.losers": ({"is": "Own", "cells": 2}, "!Own go with Logistic or Hinge"),
        "method.link": ({"is": "Hinge", "gate": 1.}, "log"), "method.safeguard": (True, "!there are no losers")},
    "nft": {
        "method.winners": ({"is": "Top", "n": 2}, "!Candidates lose to Rated"),
        "method.winners.how.overall": (False, "log"), "method.winners.how.clip": (.3, "log adapter"),
        "method.winners.frozen": (False, "log"),
        "method.losers": ({"is": "Fresh", "k": 3, "crops": 1}, "log adapter"), "method.losers.k": (2, "log adapter"),
        "method.link": ({"is": "DGPO", "kappa": 10.}, "log"), "method.link.beta": (2., "log"),
        "method.link.adaptive": (True, "log"), "method.link.full": (.5, "log adapter"),
        "method.safeguard": (True, "!rated candidates are not parted"),
        "judging.reward": ("offline_fr", "bounds log metrics")},
    "nft_online": RATED | {
        "method.losers": ({"is": "Candidates", "k": 3}, "log adapter"), "method.losers.k": (2, "log adapter"),
        "method.losers.crops": (2, "log adapter"), "method.losers.every": (2, "log adapter"),
        "method.losers.decay": (.1, "log"), "method.losers.ramp": (.1, "log"), "judging.m": (5, "bank bounds")},
    "dgpo": RATED | {"method.link": ({"is": "CRD", "beta": 10.}, "log"), "method.link.kappa": (20., "log")},
    "crd": RATED | {"method.link": ({"is": "DGPO", "kappa": 10.}, "log"), "method.link.beta": (20., "log"),
                    "method.link.adaptive": (True, "log")},
    "riesz": {"method.losers.radius": (.1, "log adapter")},
    "given": {"method.losers.outputs": (("base", "bicubic"), "bank log adapter")},
    "expert": {"method.winners.n": (1, "log adapter"), "method.winners.frozen": (True, "log adapter"),
               "method.winners.scale": ({"is": "GroupRank"}, "log adapter")},
    "gated": {"method.link.gate": (2., "log")},
    "braked": { # what rings, with what they make of it: tests/test_brake.py
        "brake": (None, "look looks"), "brake.look_m": (3, "look", {"judging.eval_m": 3}),
        "brake.look_every": (2, "look", {"loop.save_every": 1}), "brake.watched": (("ssim_y",), "look"),
        "brake.alpha": (.1, "!can never ring"), "brake.floor": (2., ""), "brake.stop": ("judge", "")},
    "base": PATCHES | looped("loop", "policy", "log", "kept") | below("options", dict(
        control=("folder", OTHER), train=("control", OTHER), guidance=(2., OTHER), negative=("noise", OTHER),
        control_scale=(.5, OTHER), max_tokens=(77, OTHER), texts=("folder", OTHER), prediction=("epsilon", OTHER),
        checkpointing=(True, OTHER), tile_vae=(True, OTHER), levels=("shifted", OTHER),
        variant=("fp16", OTHER), quantize=("4bit", OTHER), offload_vae=(True, OTHER), attention=("flash", OTHER),
        compile=(True, OTHER))) | {
        "prompts": (given("prompts"), "!BaseRun.prompts is for"),
        "prompt_dropout": (.5, "!BaseRun.prompt_dropout is for"), "rank": (3, "!BaseRun.rank is for"),
        "restorer": (given("restorer"), "log policy"), "net.restored": (True, "!by naming a restorer"),
        "net.features": (8, "!set restored"),
        "net.mean_channels": (16, "policy"), "net.mean_blocks": (2, "policy"), "net.scale": (2, "policy")},
    "distil": {k: v for k, v in PATCHES.items() if not k.startswith("net.")} | looped("loop", "policy", "log", "kept"
        ) | below("crops", dict(side=(72, "log policy"), first=(4, "log policy"), fresh=(2, "log policy"),
                                every=(2, "log policy"), most=(3, "log policy"), clean=(.6, "log policy"),
                                mild=(.7, "log policy"), flat=(.9, "log policy"))) | below("to_teacher", PULL) | below(
        "to_truth", PULL) | dict(
        versions=(2, "!leave it 0"), max_side=(96, "log policy"), patch=(44, "log policy"), margin=(3, "log policy"),
        window=(36, "log policy", dict(margin=2)),
        teacher=(given("onestep2"), "log policy", {"to_truth.l1": 0., "to_truth.lpips": 0.}),
        init=(given("restorer2"), "log policy"), keep=((0,), "policy", dict(init=None))),
    "ctmsr": PATCHES | looped("loop", "policy", "log", "stage1") | dict(
        init=(given("onestep"), "!leave net out"), held_out=(folder("others_held"), "after metrics"),
        size=(80, "after metrics"), eval_m=(3, "after metrics"), judges=(("ssim_y",), "metrics"),
        blind=(given("wild"), "blind blind-sr", dict(judges=("psnr_y", "piqe"))),
        take=(1, "log policy after"), first=(5, "log"), last=(2, "log"), lpips_weight=(.9, "log policy"),
        window=(32, "log policy")) | below("match", dict(
            gap=("sds", "log policy"), weight=(.8, "log policy"), inside=(False, "log"), refresh=(1, "log"))
            ) | looped("match.match_loop", "policy", "log", "!refresh") | {
        "net.tail": (16, "policy"), "net.scale": (2, "policy")},
    "warm": dict(init=(given("tiny2"), "log policy")), "continued": dict(init=(given("onestep2"), "log policy"))}
OWN = {s: {p: v for p, v in o.items() if s not in ("nft_online", "dgpo", "crd") or p in paths_of(s)}
       for s, o in OWN.items()} # what they share may name another link's fields
TABLE = {s: (EVERY if s in ALIGNED else OWN[SETTINGS[s][0]]) | OWN.get(SETTINGS[s][0], {}) | OWN.get(s, {})
         for s in SETTINGS}
PLACES = {"out", "banks"} # fields that name places alone
BANK = dict(dp2o="bank", dpo="bank", asasr="outputs", given="outputs", expert="bank",
            nft="bank", nft_online="bank", dgpo="bank", crd="bank") # what is made of training crops
OWN_BANKS = {"bank", "before", "outputs", "reference", "adversary", "stage1"} # who must differ there shares nothing
NAMES = {"bank-after": "after", "begun-bank": "bank", "held_out": "after", "started-before": "before",
         "reference-adversary": "adversary", "blind-started-before": "blind-before"}


def marked(setting, path):
    "A test's parameter: a repetition where the code that reads the field is that of another setting"
    *_, top, name = "", *path.split(".")
    loop = top in ("loop", "imitation", "start_loop", "match_loop") and name != "lr"
    fast = path in ("batch", "patch", "seed", "loop.lr", "method.energy.s") or path in OWN[setting] and not loop
    if setting in ("nft", "nft_online", "dgpo", "crd"): # what is not in nft's own code is in others
        fast = setting in ("nft", "nft_online") and path in OWN[setting] and path.startswith("method.") and (
            setting == "nft" or path not in RATED)
    if setting == "braked": fast = path == "brake.alpha"
    if setting == "votes": fast = path.startswith("method.losers") or path == "data.photos" # the rest is read as dpo's
    return pytest.param(setting, path, marks=() if fast or setting == "dpo" else pytest.mark.repeat)


def bank_of(setting, run, what):
    "The bank of a run's training crops, or of its held-out photographs before or after"
    out, shared, _ = run
    if what == "crops": return shared/BANK.get(setting, "bank")
    if what == "before" and shared != out: return shared/f"{'started-' if setting == 'asasr' else ''}before-2"
    if what == "before": return out/"before"
    return out/("held_out" if SETTINGS[setting][0] == "ctmsr" else "bank-after")


def policies_of(setting, w, run, path=None):
    "The policy before, and after"
    out, shared, _ = run
    def base():
        policy = from_pretrained(w["tiny"], path)
        return policy if setting != "asasr" else load_adapter(policy, shared/"reference"/"adapter", "reference")
    return base(), load_adapter(base(), out/"adapter")


PEOPLE = """
import torch
from srnb.pairs import Pairs
def chosen():
    g, shapes = torch.Generator().manual_seed(0), ((3, 16, 16), (1, 3, 64, 64), (1, 3, 64, 64))
    lq, w, l = (torch.randint(0, 256, (2, *s), generator=g, dtype=torch.uint8) for s in shapes)
    return Pairs(list(lq), list(w), list(l), torch.ones(2, 1, 1))
"""



def vote_folder(top, first):
    "Two inputs, two enlargements of each, and one vote on each; another winner makes another folder"
    g = generator(0)
    for image in ("one", "two"):
        for name, side in (("lq", 16), ("candidates/x", 64), ("candidates/y", 64)):
            (top/name).mkdir(parents=True, exist_ok=True)
            to_pil(torch.rand(3, side, side, generator=g)).save(top/name/f"{image}.png")
    (top/"votes.csv").write_text(f"image,winner,loser\none,{first},{'xy'.replace(first, '')}\ntwo,y,x\n")
    return str(top)


# ---------------------------------------------------------------- folders and runs that the tests share


def random_policy(folder, net, *rest, seed=0, gain=.4):
    g = generator(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g)*(gain/p[0].numel()**.5 if p.ndim > 1 else .05))
    return str(save_pretrained(Policy(net, *rest), folder))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Folders of two small photographs each, two bases, two one-step networks, prompts and a reader's own pairs"
    top, photos = tmp_path_factory.mktemp("world"), embedded_photos("train")
    w = dict(prompts=str(top/"prompts.json"), pairs=f"{top}/people.py:chosen")
    for k, name in enumerate(("train", "held", "others", "others_held")):
        w[name] = str(top/name)
        (top/name).mkdir()
        for p in photos[2*k:2*k+2]: to_pil(p.read()[:, 60:156, 80:192].contiguous()).save(top/name/f"{p.id}.png")
    (top/"wild").mkdir()
    for k, p in enumerate(embedded_photos("held_out")[:2]): # low-quality pictures without ground truth
        to_pil(p.read()[:, :24+k, :32].contiguous()).save(top/"wild"/f"{p.id}.png")
    w["wild"] = str(top/"wild")
    small, one_step = UNetConfig((16, 16), (1, 1), 16, 16, 1), OneStepConfig((16, 16), (1, 1), 16, 8)
    for k, (name, more) in enumerate((("tiny", "onestep"), ("tiny2", "onestep2"))):
        w[name] = random_policy(top/name, SmallUNet(small), seed=2*k)
        w[more] = random_policy(top/more, OneStepUNet(one_step), Shift(), Shift(), PixelCodec(), seed=k)
    policy = from_pretrained(w["tiny"])
    for p in policy.add_lora(3, seed=1): p.data.add_(.05*torch.randn(p.shape, generator=generator(7)))
    w["adapter"] = str(save_adapter(policy, top/"adapter")) # of an earlier run
    for k, name in enumerate(("restorer", "restorer2")):
        w[name] = random_policy(top/name, RRDBNet(RRDBConfig(8, 4, 2, 8)), Shift(), Shift(), PixelCodec(), seed=k,
                                gain=1.)
    (top/"prompts.json").write_text(json.dumps({p.id: "a tree" for p in photos[:4]}))
    (top/"people.py").write_text(PEOPLE)
    for name, first in (("votes", "x"), ("votes2", "y")): w[name] = vote_folder(top/name, first)
    return w


def traces(*folders):
    "Digests of what a run left: of each table, bank and adapter, not of what it was told, nor of its checkpoints"
    found = {}
    for top in dict.fromkeys(folders):
        for f in sorted(top.rglob("*")):
            parts = f.relative_to(top).parts
            if f.suffix not in (".parquet", ".safetensors") and f.name != "bounds.json": continue
            if "scores" in parts or any(o.startswith("checkpoint") for o in parts): continue
            name = re.sub(r"-(\d.*|[0-9a-f]{16})$", "", parts[0].split(".")[0])
            found.setdefault(NAMES.get(name, name), []).append((parts[1:], hashlib.sha256(f.read_bytes()).hexdigest()))
    return {n: sorted(o) for n, o in found.items()}


class Runs:
    "Each run is done once: its folder, that of what it shares, and its traces"
    def __init__(self, world, top): self.world, self.top, self.done, self.begun = world, top, {}, 0

    def make(self, setting, shared=False, changes=()):
        "A run, in a folder of its own"
        run, self.begun = shape(setting), self.begun+1
        places = dict(out=str(self.top/f"run{self.begun}"))
        if shared and "banks" in leaves(run): places["banks"] = str(self.top/f"banks-{setting}")
        return fill(fill(run, SETTINGS[setting][2](self.world)), dict(changes) | places) # small first, then another

    def run(self, setting, shared=False, changes=()):
        key = setting, shared, repr(changes or {})
        if key not in self.done:
            run = self.make(setting, shared, changes)
            out, banks = train(run), self.top/f"banks-{setting}"
            banks = banks if shared and banks.exists() else out
            if not self.done: # a run asks the collector several times, which would look at everything that was imported
                gc.collect()
                gc.freeze()
            self.done[key] = out, banks, traces(out, banks)
        return self.done[key]

    def base(self, setting): return self.run(setting, shared=True)

    def changed(self, setting, path):
        "Two runs that differ in one field alone"
        value, where, *extra = TABLE[setting][path]
        extra = extra[0] if extra else {}
        run = self.make(setting, changes=extra)
        if callable(value): value = value(self.world, run)
        assert leaves(run)[path][1] != value
        refused = where.startswith("!") # and nobody shall find what such a run has left
        shared = not (extra or refused or OWN_BANKS & set(words(setting, where)))
        after = self.run(setting, bool(where) and shared, extra | {path: value})
        return self.run(setting, not extra, extra), after


def words(setting, where):
    "Names of traces; `bank` is what a setting makes of its training crops, if anything"
    found = [dict(bank=BANK.get(setting), samples="bank").get(o, o) for o in where.split()]
    return [o for o in found if o]


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch: # what costs time and decides nothing
        patch.setattr(data, "open_photo", functools.cache(data.open_photo))
        patch.setattr(core, "git_revision", lambda: None)
        patch.setattr(core, "versions", functools.cache(core.versions))
        patch.setattr(peft.PeftModel, "create_or_update_model_card", lambda *a: None)
        yield Runs(world, tmp_path_factory.mktemp("runs"))
        gc.unfreeze()


def log_of(run): return pd.read_parquet(run[0]/"log.parquet")


# ---------------------------------------------------------------- every field

@pytest.mark.parametrize("setting", SETTINGS)
def test_every_field_of_every_run_has_an_entry(setting):
    there = set(paths_of(setting))
    assert there - PLACES <= set(TABLE[setting]) and set(OWN.get(setting, {})) <= there


def test_every_choice_is_made_by_some_run():
    runs = [shape(s) for s in ALIGNED]
    for f in fields(Method):
        choices = set(get_args(f.type))
        assert choices <= {type(getattr(o.method, f.name)) for o in runs}, f.name


def test_there_is_a_setting_of_every_preset(): assert set(PRESETS) == set(presets())


def test_a_preset_is_the_method_of_its_paper():
    "Energy, winners, losers, link, start: numbers that nobody changes by accident"
    def said(name): return record(presets()[name][1].method)
    def method(s, winners, losers, link, start=None):
        energy = dict(s=s, frequency="half", unit_mean=True, mean=True)
        return dict(energy=energy, winners=winners, losers=losers, link=link, start=start, safeguard=False)
    loop = dict(warmup=10, parts=1, weight_decay=.01, clip=1., ema=0., log_every=5, keep_every=0, optimiser="adamw",
                log_with="tensorboard")
    models, photograph = ["real_esrgan", "dat_light", "base"], {"is": "Photograph"}
    adversary = {"is": "Adversary", "outputs": models, "adversary_rank": 16, "lam": 1.,
                 "imitation": loop | dict(steps=120, lr=3e-4, decay=.5, save_every=40)}
    start = dict(start_loop=loop | dict(steps=60, lr=1e-4, decay=.5, save_every=30))
    def logistic(kappa): return {"is": "Logistic", "kappa": kappa}
    assert said("sft") == method(0., photograph, {"is": "Nobody"}, None)
    assert said("dpo") == method(0., photograph, {"is": "Samples"}, logistic(3000.))
    assert said("votes") == method(0., {"is": "Preferred"}, {"is": "Voted", "folder": ""}, logistic(1000.))
    assert said("dp2o") == method(0., {"is": "Top", "n": 4, "frozen": False, "scale": None},
                                  {"is": "Bottom", "intra": True, "inter": True, "pairs": None, "tracked": False},
                                  logistic(1000.))
    assert said("asasr") == method(1.5, photograph, adversary, logistic(10_000.), start)
    assert said("dro") == method(0., photograph, {"is": "Own", "every": 16, "capacity": 8, "refresh": 8, "cells": 10},
                                 {"is": "Hinge", "gate": .001})
    def rated(overall=True): return {"is": "Rated", "how": dict(overall=overall, clip=5.), "frozen": True}
    bank, nft = {"is": "Candidates", "k": 8}, {"is": "NFT", "beta": 1., "adaptive": False, "full": 2.}
    online = {"is": "Fresh", "k": 8, "crops": 2, "every": 10, "decay": .5, "ramp": .001}
    assert said("nft") == method(0., rated(), bank, nft) and said("nft_online") == method(0., rated(), online, nft)
    assert said("dgpo") == method(0., rated(False), bank, {"is": "DGPO", "kappa": 2000.})
    assert said("crd") == method(0., rated(), bank, {"is": "CRD", "beta": 1000., "adaptive": False})


def own_paths(setting): # those whose other value the table has for this very setting
    return [p for p in paths_of(setting) if p in OWN.get(setting, {}) or setting in PRESETS and p not in PLACES]


def test_a_flat_name_is_the_highest_field():
    run = fill(presets()["asasr"][1], dict(steps=7, seed=3))
    assert (run.loop.steps, run.method.losers.imitation.steps, run.method.start.start_loop.steps) == (7, 120, 60)


CHANGES = [marked(s, p) for s in SETTINGS for p in own_paths(s)]


@pytest.mark.parametrize("setting", [pytest.param(o, marks=[pytest.mark.repeat]*(o in ("nft_online", "dgpo", "crd")))
                                     for o in SETTINGS])
def test_every_field_is_in_the_record_of_a_run_which_can_be_run_again(runs, setting):
    "Folders apart, which may be moved; what stands behind the name of a reader's own object is recorded as well"
    def again(run): return from_json(json.loads(json.dumps(dict(run=type(run).__name__, config=record(run)))))
    run, unsaid = runs.make(setting), []
    assert again(run) == run
    for path in (p for p in own_paths(setting) if TABLE[setting][p][1][:1] != "!"):
        value, _, *extra = TABLE[setting][path]
        one = runs.make(setting, changes=extra[0] if extra else {})
        other = fill(one, {path: value(runs.world, one) if callable(value) else value})
        if record_of(other) == record_of(one): unsaid.append(path)
        assert again(other) == other
    assert unsaid == []
    assert record_of(fill(run, dict(out="elsewhere"))) == record_of(run)


@pytest.mark.parametrize("setting, path", CHANGES)
def test_every_field_changed_alone_changes_what_a_run_leaves(runs, setting, path):
    where = TABLE[setting][path][1]
    if where.startswith("!"):
        with pytest.raises(ValueError, match=where[1:]): runs.changed(setting, path)
        return
    before, after = (o[2] for o in runs.changed(setting, path))
    names = words(setting, where)
    assert names if where else before == after
    assert all(n in before | after for n in names), (names, before.keys(), after.keys())
    assert [n for n in names if before.get(n) == after.get(n)] == []


@pytest.mark.parametrize("setting, path, what", [
    *(("dp2o", p, "bank bounds log adapter") for p in ("data.held_out", "judging.eval_m")),
    ("dp2o", "judging.m", "before"), ("asasr", "data.held_out", "outputs reference adversary log adapter"),
    ("dpo", "seed", "bank before"), ("asasr", "method.losers.outputs", "reference before"),
    ("asasr", "seed", "outputs reference before"),
    *(("ctmsr", p, "log policy") for p in ("held_out", "eval_m")),
    ("dp2o", "judging.blind", "bank bounds before after log adapter metrics psd"),
    ("asasr", "judging.blind", "outputs reference adversary before after log adapter metrics psd"),
    ("ctmsr", "blind", "log policy after metrics")])
def test_what_a_field_must_leave_alone(runs, setting, path, what):
    "Nothing that is held out reaches training; a run's seed does not reach what runs share"
    before, after = (o[2] for o in runs.changed(setting, path))
    assert [n for n in what.split() if before[n] != after[n]] == []


@pytest.mark.parametrize("setting", ["base", "dp2o", "asasr", "dro", "ctmsr",
                                     pytest.param("nft_online", marks=pytest.mark.repeat)])
def test_the_same_config_leaves_the_same(runs, setting):
    "Without this the test above would show nothing; and sharing changes nothing"
    assert runs.base(setting)[2] == runs.run(setting)[2]


STILL = {"loop.lr": 1e-12} # nothing moves


@pytest.mark.parametrize("setting, column", [
    ("base", "flow"), ("ctmsr", "consistency"), ("sft", "loss"),
    pytest.param("nft_online", "error", marks=pytest.mark.repeat),
    *((s, "error_w") for s in ("dp2o", "asasr", "dro", "dpo"))])
def test_every_micro_batch_of_every_step_is_a_draw_of_its_own(runs, setting, column):
    "Two micro-batches are not twice the first; a step that moves nothing is followed by another batch"
    one, two = (log_of(runs.run(setting, True, STILL | {"loop.parts": p}))[column] for p in (1, 2))
    assert one[0] != pytest.approx(two[0], rel=1e-6) and one[0] != pytest.approx(one[1], rel=1e-6)


@pytest.mark.parametrize("path, stage", [("method.start.start_loop", "reference"),
                                         ("method.losers.imitation", "reference-adversary-3-0")])
def test_so_is_every_micro_batch_of_an_earlier_stage(runs, path, stage):
    still = below(path, dict(lr=1e-12))
    logs = [runs.run("asasr", False, still | {f"{path}.parts": p})[0]/stage/"log.parquet" for p in (1, 2)]
    one, two = (pd.read_parquet(o).loss for o in logs)
    assert one[0] != pytest.approx(two[0], rel=1e-6) and one[0] != pytest.approx(one[1], rel=1e-6)


@pytest.mark.parametrize("setting, column", [
    ("warm", "flow"), ("continued", "consistency"), ("sft", "loss"),
    pytest.param("nft_online", "error", marks=pytest.mark.repeat),
    *((s, "error_w") for s in ("dp2o", "asasr", "dro", "dpo"))])
def test_another_seed_draws_other_batches_and_another_adapter(runs, setting, column):
    "The first step's log knows the batch alone: every base is the same, and an adapter begins with B = 0"
    one, two = runs.changed(setting, "seed")
    assert log_of(one)[column][0] != pytest.approx(log_of(two)[column][0], rel=1e-6)
    if (one[0]/"adapter").exists(): # two steps move a weight by .02; A begins within .08
        a, b = (load_file(o[0]/"adapter"/"adapter_model.safetensors") for o in (one, two))
        assert max((a[n]-b[n]).abs().max() for n in a if "lora_A" in n) > .06


def test_the_stages_of_a_one_step_run_draw_their_own_batches(runs):
    "Weights that stand still, and as many intervals in both: only other pictures and noise make another loss"
    still = STILL | {"match.match_loop.lr": 1e-12, "first": 3}
    found = log_of(runs.run("ctmsr", False, still)).consistency
    assert len(set(found.round(6))) == 4


@pytest.mark.parametrize("setting, path", [
    *(("dpo", f"base.{p}") for p in ("backbone", "path", "sampler", "sample_steps")),
    *(("dpo", p) for p in ("data.size", "data.degradation", "data.photos", "judging.m")),
    *(("asasr", f"method.{p}") for p in ("losers.outputs", "losers.imitation.lr", "start.start_loop.lr")),
    *(("asasr", p) for p in ("batch", "patch", "rank", "base.sampler", "data.places"))])
def test_a_run_that_would_need_another_bank_or_stage_does_not_take_what_is_shared(runs, setting, path):
    value = TABLE[setting][path][0]
    runs.base(setting)
    run = runs.make(setting, True, {path: value(runs.world, runs.make(setting)) if callable(value) else value})
    with pytest.raises(core.RunOccupied, match="differ"): train(run)


# ---------------------------------------------------------------- pictures: what was named, degraded as was named

@pytest.mark.parametrize("setting", ["dp2o", "asasr", "dpo", "ctmsr"])
def test_banks_hold_the_named_photographs_and_their_named_degradation(runs, setting):
    "Held out: the middle of each; training crops: the middle, then the corners"
    w, run = runs.world, runs.base(setting)
    banks = [(bank_of(setting, run, "after"), w["held"], None)]
    if setting != "ctmsr":
        more = runs.run(setting, False, {"data.places": 2})
        banks += [(bank_of(setting, run, "before"), w["held"], None), (bank_of(setting, run, "crops"), w["train"], 1),
                  (bank_of(setting, more, "crops"), w["train"], 2)]
    for bank, photos, places in banks:
        names = {(p.id if places is None else f"{p.id}-{k}"): (p, k) for p in find_photos(photos)
                 for k in range(places or 1)}
        assert set(finished_groups(bank)) == set(names)
        for i, (p, k) in names.items():
            group, (lq, gt) = read_group(bank, i), make_pair(p, 64, RESSHIFT_TEST, place=k)
            assert torch.equal(group.lq, lq) and torch.equal(group.gt, gt)


AVERAGED = {"loop.ema": .9}


@pytest.mark.parametrize("setting, changes", [
    ("dp2o", AVERAGED), ("dp2o", {"base.path": "vp_v", "base.sampler": "ab2", "base.sample_steps": 3}),
    ("asasr", AVERAGED), ("dro", AVERAGED), ("dpo", {"drift": 1e-9, "loop.keep_every": 1})],
    ids=["dp2o", "ab2", "asasr", "dro", "drift"])
def test_samples_before_are_the_bases_and_samples_after_the_adapters(runs, setting, changes):
    "Drawn again by hand: the run's path, sampler and steps, and a photograph's own seeds"
    run = runs.run(setting, "base.sampler" not in changes, changes)
    path, sampler = VPV() if "base.path" in changes else None, SAMPLERS.get(changes.get("base.sampler"))
    before, after = policies_of(setting, runs.world, run, path)
    cases = [(bank_of(setting, run, "before"), before), (bank_of(setting, run, "after"), after)]
    if "drift" in changes:
        near = load_adapter(from_pretrained(runs.world["tiny"]), run[0]/"matched-adapter")
        cases.append((run[0]/"bank-matched", near))
    found = []
    for bank, policy in cases:
        for i in finished_groups(bank):
            group = read_group(bank, i)
            sr = policy.sample(group.lq[None], group_seeds(i, 2), changes.get("base.sample_steps", 2), sampler)[0]
            assert torch.equal(sr, group.sr), (bank.name, i)
        found.append(sr)
    assert not any(torch.equal(a, b) for k, a in enumerate(found) for b in found[:k])


def test_the_copy_nearest_to_the_drift_is_the_one_that_is_judged(runs):
    "By the weights that were kept: a tiny drift is that of the first copy; without one the last is chosen"
    run = runs.run("dpo", True, {"drift": 1e-9, "loop.keep_every": 1})
    table = pd.read_parquet(run[0]/"drift.parquet")
    assert table.step.tolist() == [1, 2] and table.chosen.tolist() == [True, False]
    assert 0 < table.drift[0] < table.drift[1]
    for name, step in (("matched-adapter", 1), ("adapter", 2)):
        kept = weights_of(run[0]/"kept"/f"{step:08d}.safetensors")
        written = weights_of(run[0]/name/"adapter_model.safetensors")
        assert kept.keys() == written.keys() and all(torch.equal(kept[n], written[n]) for n in kept)
    table = pd.read_parquet(runs.run("dpo", True, {"loop.keep_every": 1})[0]/"drift.parquet")
    assert table.chosen.tolist() == [False, True]


def test_the_crops_of_a_run_are_the_bases_samples_and_outputs(runs):
    policy = from_pretrained(runs.world["tiny"])
    for setting in ("dp2o", "dpo"):
        bank = bank_of(setting, runs.base(setting), "crops")
        for i in finished_groups(bank):
            group = read_group(bank, i)
            assert torch.equal(policy.sample(group.lq[None], group_seeds(i, 4), 2)[0], group.sr)
    for run, photos in ((runs.base("asasr"), "train"), (runs.base("given"), "train"), (runs.base("given"), "held")):
        bank = run[1]/("outputs" if photos == "train" else "held_out_outputs")
        assert len(finished_groups(bank)) == 2
        for i in finished_groups(bank):
            group = read_group(bank, i)
            photo = next(p for p in find_photos(runs.world[photos]) if i in (p.id, f"{p.id}-0"))
            assert torch.equal(group.lq, make_pair(photo, 64, RESSHIFT_TEST)[0])
            assert torch.equal(group.sr[0], BASELINES["bicubic"](group.lq[None])[0])
            assert torch.equal(group.sr[1], policy.sample(group.lq[None], [0], 2)[0, 0])


def test_samples_of_a_one_step_run_are_those_of_the_policy_that_it_wrote(runs):
    run = runs.base("ctmsr")
    policy = from_pretrained(run[0]/"policy")
    for i in finished_groups(run[0]/"held_out"):
        group = read_group(run[0]/"held_out", i)
        assert torch.equal(policy.sample(group.lq[None], group_seeds(i, 2), 1)[0], group.sr)


# ---------------------------------------------------------------- metrics, from the banks, by hand

BLIND = Reward("offline_nr", nr=(PIQE,))


def rows_of(metrics, variant, image):
    "metric -> values in the order of the seeds"
    rows = metrics[(metrics.variant == variant) & (metrics.image == image)].sort_values("seed")
    return {n: o.value.tolist() for n, o in rows.groupby("metric")}


def spread_of(sr): # two seeds: their standard deviation is half their distance, times root 2
    return 255*((sr[0]-sr[1]).square()/2).mean().sqrt().item()


def by_hand(sr, gt, reward=None, bounds=None, metrics=(PSNR_Y,)):
    scores = score_group([*metrics, *(reward.metrics if reward else ())], sr, gt)
    if reward: scores["reward"] = hybrid(scores, reward, bounds)
    return {n: v.tolist() for n, v in scores.items()}


@pytest.mark.parametrize("setting, changes, reward", [
    ("dp2o", {}, BLIND), ("asasr", {}, None), ("dpo", {"drift": 1e-9, "loop.keep_every": 1}, None)],
    ids=["dp2o", "asasr", "drift"])
def test_every_row_of_the_metrics_is_that_of_the_banks(runs, setting, changes, reward):
    "Before, after, matched and bicubic: scores, the reward on the bounds of the training bank, how far samples moved"
    run = runs.run(setting, True, changes)
    out, metrics, codec = run[0], pd.read_parquet(run[0]/"metrics.parquet"), from_pretrained(runs.world["tiny"]).codec
    banks = {n: bank_of(setting, run, n) for n in ("before", "after")}
    if changes: banks["matched"] = out/"bank-matched"
    assert set(metrics.variant) == {*banks, "bicubic"} and set(metrics.image) == set(finished_groups(banks["before"]))
    bounds = GlobalBounds.load(out/"bounds.json") if reward else None
    for i in finished_groups(banks["before"]):
        first = read_group(banks["before"], i)
        y = bicubic(first.lq[None], first.gt.shape[-2:])
        assert rows_of(metrics, "bicubic", i) == by_hand(y, first.gt, reward, bounds)
        for variant, bank in banks.items():
            group, found = read_group(bank, i), rows_of(metrics, variant, i)
            want = by_hand(group.sr, group.gt, reward, bounds)
            assert {n: found.pop(n) for n in want} == want, variant
            moved = [((a-b)/codec.scale).square().mean().item() for a, b in zip(group.sr, first.sr, strict=True)]
            check_close(found.pop("moved"), moved, rtol=1e-5)
            assert (max(moved) > 0) == (variant != "before")
            check_close(found.pop("spread"), [spread_of(group.sr)], rtol=1e-5)
            beside = {"preference_loss", "accuracy"} if (setting, variant) == ("asasr", "after") else set()
            assert set(found) == beside


def test_the_bounds_of_the_reward_are_those_of_the_training_bank(runs):
    run = runs.base("dp2o")
    bank = bank_of("dp2o", run, "crops")
    scores = torch.cat([score_group([PIQE], read_group(bank, i).sr)["piqe"] for i in finished_groups(bank)])
    worst, best = scores.max().item(), scores.min().item()
    assert GlobalBounds.load(run[0]/"bounds.json").bounds == (("piqe", worst, best),)


def test_every_row_of_a_one_step_runs_metrics_is_that_of_its_bank(runs):
    out = runs.base("ctmsr")[0]
    metrics = pd.read_parquet(out/"metrics.parquet")
    assert set(metrics.variant) == {"sr", "bicubic"}
    for i in finished_groups(out/"held_out"):
        group = read_group(out/"held_out", i)
        found = rows_of(metrics, "sr", i)
        check_close(found.pop("spread"), [spread_of(group.sr)], rtol=1e-5)
        assert found == by_hand(group.sr, group.gt)
        assert rows_of(metrics, "bicubic", i) == by_hand(bicubic(group.lq[None], group.gt.shape[-2:]), group.gt)


def test_every_row_of_a_bases_metrics_is_that_of_its_bank(runs):
    "Samples, their mean and bicubic, of the pictures and the policy that were named"
    w, out = runs.world, runs.run("base", changes=dict(seed=5))[0]
    table = evaluate_base(out, Data((), (w["held"],), SEESR, 64, take=1), m=2, steps=2)
    metrics, photo = pd.read_parquet(out/"metrics.parquet"), find_photos(w["held"])[0]
    assert metrics.equals(table) and metrics.image.unique().tolist() == [photo.id]
    group = read_group(out/"held_out", photo.id)
    lq, gt = make_pair(photo, 64, SEESR)
    assert torch.equal(group.lq, lq) and torch.equal(group.gt, gt) and len(group.sr) == 2
    images = dict(sample=group.sr, mean=group.sr.mean(0, keepdim=True), bicubic=bicubic(lq[None], gt.shape[-2:]))
    judges = [PSNR_Y, ST_LPIPS_ALEX, ST_LPIPS_VGG, PIQE]
    for variant, sr in images.items():
        want, found = by_hand(sr, gt, metrics=judges), rows_of(metrics, variant, photo.id)
        if variant == "sample": check_close(found.pop("spread"), [spread_of(sr)], rtol=1e-5)
        assert found == want, variant
    sr = from_pretrained(out/"policy", dtype=torch.bfloat16).sample(lq[None], group_seeds(photo.id, 2), 2)[0]
    assert torch.equal(sr, group.sr)


# ---------------------------------------------------------------- what is trained on, and towards what

def curated(bank, n, frozen=False, levels=(True, True)):
    "(group, winners, losers, weight) of every crop, from the bank's pictures alone"
    groups = [read_group(bank, i) for i in finished_groups(bank)]
    scores = [score_group([PIQE], o.sr) for o in groups]
    if frozen:
        every = torch.cat([o["piqe"] for o in scores])
        scale = GlobalBounds((("piqe", every.max().item(), every.min().item()),))
    else: scale = GroupMinMax()
    values = torch.stack([hybrid(o, BLIND, scale) for o in scores])
    w, l = top_bottom(values, n)
    return list(zip(groups, w, l, hpo_weights(values, w, l, *levels), strict=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_the_first_loss_is_ln_2_times_the_weight_of_a_crop(runs, frozen):
    "Of one group a step, on the scale that was named: the other would give other weights"
    run = runs.run("dp2o", True, {"method.winners.frozen": True} if frozen else {})
    weights = {k: [o[3].mean().item() for o in curated(bank_of("dp2o", run, "crops"), 2, k)] for k in (False, True)}
    apart = min(abs(a-b) for a in weights[False] for b in weights[True])
    found = log_of(run).loss[0]/math.log(2)
    assert min(abs(found-o) for o in weights[frozen]) < 1e-5 and apart > 1e-4, (found, weights)


@pytest.mark.parametrize("intra, inter", [(False, False), (True, False), (False, True)])
def test_the_levels_of_the_weights_are_those_that_were_named(runs, intra, inter):
    "The first loss tells the level of the groups; whether pairs are weighed as well the second loss tells"
    def log(**levels): return log_of(runs.run("dp2o", True, below("method.losers", levels)))
    found, other = log(intra=intra, inter=inter), log(intra=not intra, inter=inter)
    weights = [o[3].mean().item() for o in curated(runs.base("dp2o")[1]/"bank", 2, levels=(intra, inter))]
    assert min(abs(found.loss[0]/math.log(2)-o) for o in weights) < 1e-5
    assert other.loss[0] == pytest.approx(found.loss[0], rel=1e-5)
    assert other.loss[1] != pytest.approx(found.loss[1], rel=1e-6)


def margin(policy, lq, winners, losers, levels=9):
    "How much further the winners' error fell than the losers', mean over noise levels"
    g, sigma = generator(3), torch.linspace(.1, .9, levels)
    eps, gaps = torch.randn(levels, 3, *(4*o for o in lq.shape[-2:]), generator=g), []
    for images in (winners, losers):
        gap = []
        for image in images:
            z = policy.codec.encode(image[None], lq[None]).expand_as(eps)
            x, target = policy.path.state(z, eps, sigma), policy.path.target(z, eps, sigma)
            cond = lq[None].expand(levels, -1, -1, -1)
            with torch.no_grad(): now = l2_energy(policy.residual(x, sigma, target, cond))
            with policy.reference(): gap.append((now-l2_energy(policy.residual(x, sigma, target, cond))).mean())
        gaps.append(torch.stack(gap).mean())
    return (gaps[1]-gaps[0]).item()


LONGER = below("loop", dict(steps=16, lr=5e-3))


TOP = {"method.winners": {"is": "Top", "n": 1}, "judging.reward": "offline_nr"}


@pytest.mark.parametrize("setting, changes", [("dp2o", ONE), ("given", {}), ("dpo", {}), ("sft", TOP)],
                         ids=["dp2o", "given", "dpo", "top"])
def test_training_moves_towards_the_winners_and_away_from_the_losers(runs, setting, changes):
    "Best against worst samples, or the photograph against other pictures, judged on the bank by hand"
    run = runs.run(setting, True, LONGER | changes)
    policy, bank = policies_of(setting, runs.world, run)[1], bank_of(setting, run, "crops")
    found = []
    for group, w, l, _ in curated(bank, 1):
        winners, losers = (group.sr[w], group.sr[l]) if changes else (group.gt[None], group.sr)
        found.append(margin(policy, group.lq, winners, losers))
    assert sum(found) > 0, found


def test_training_moves_towards_the_photograph_and_away_from_what_the_adversary_makes_of_it(runs):
    run = runs.run("asasr", True, LONGER)
    policy, found = policies_of("asasr", runs.world, run)[1], []
    load_adapter(policy, run[1]/"reference-adversary-3-0"/"adapter", "adversary", on=False)
    for i in finished_groups(run[1]/"outputs"):
        group = read_group(run[1]/"outputs", i)
        z, cond = policy.codec.encode(group.gt[None], group.lq[None]), policy.encode(group.lq[None])
        eps, sigma = torch.randn(z.shape, generator=generator(1)), torch.tensor([.5])
        loser = policy.codec.decode(adversary_loser(policy, z, eps, sigma, cond), group.lq[None])
        found.append(margin(policy, group.lq, group.gt[None], loser))
    assert sum(found) > 0, found


def test_the_adversary_imitates_upon_the_start(runs):
    "Its estimate of the clean image is made by both adapters"
    run = runs.base("asasr")
    policy = load_adapter(from_pretrained(runs.world["tiny"]), run[1]/"reference"/"adapter", "reference")
    load_adapter(policy, run[1]/"reference-adversary-3-0"/"adapter", "adversary", on=False)
    group = read_group(run[1]/"outputs", finished_groups(run[1]/"outputs")[0])
    z, cond = policy.codec.encode(group.gt[None], group.lq[None]), policy.encode(group.lq[None])
    eps, sigma = torch.randn(z.shape, generator=generator(1)), torch.tensor([.5])
    def estimate(*adapters):
        x = policy.path.state(z, eps, sigma)
        with policy.using(*adapters): return x-.5*policy.predict(x, sigma, cond)
    losers, work = presets()["asasr"][1].method.losers, SimpleNamespace(on={"reference": None})
    found = losers.loser(work, None)(policy, SimpleNamespace(z=z, eps=eps, sigma=sigma, cond=cond))
    check_close(found, estimate("reference", "adversary"), atol=1e-6)
    assert (found-estimate("adversary")).abs().max() > 1e-4


@pytest.mark.parametrize("energy", [SobolevEnergy(1.5), SobolevEnergy(.5), l2_energy], ids=["1.5", ".5", "l2"])
def test_margins_are_of_the_energy_that_was_named(runs, energy):
    "The loss of one pair, away from the reference, by the four energies"
    policy, g = from_pretrained(runs.world["tiny"]), generator(0)
    for p in policy.add_lora(2): p.data.normal_(0, .3, generator=g)
    x, target, lq = (torch.randn(2, 3, o, o, generator=g) for o in (32, 32, 8))
    sigma, cond = torch.tensor([.3, .3]), policy.encode(lq.sigmoid())
    def losses(energy):
        with policy.reference(): ref = energy(policy.residual(x, sigma, target, cond))
        gap_w, gap_l = energy(policy.residual(x, sigma, target, cond))-ref
        return (1+(-50*(gap_l-gap_w)).exp()).log()
    draw = Draw(x, sigma, target, cond, torch.ones(1, 1, 1))
    values, *_ = draw_loss(lambda step, part: draw, policy, Logistic(50.), energy)(0, 0)
    check_close(values[0], losses(energy), rtol=1e-3)
    others = [o for o in (SobolevEnergy(1.5), SobolevEnergy(.5), l2_energy) if o != energy]
    assert all((losses(o)-losses(energy)).abs() > 1e-2*losses(energy) for o in others)


def logistic(kappa): return lambda o: (1+(-kappa*(o.gap_l-o.gap_w)).map(math.exp)).map(math.log)
def hinge(gate): return lambda o: (gate-(o.gap_l-o.gap_w)).clip(lower=0)


def gated(gate): return lambda o: (gate+o.gap_w+o.drift).clip(lower=0) # without losers


HINGE, LOGISTIC = {"method.link": {"is": "Hinge", "gate": .02}}, {"method.link": {"is": "Logistic", "kappa": 1e3}}


@pytest.mark.parametrize("setting, changes, loss", [
    ("dp2o", ONE | LOGISTIC, logistic(1e3)), ("dp2o", ONE | HINGE, hinge(.02)), ("asasr", LOGISTIC, logistic(1e3)),
    ("given", LOGISTIC, logistic(1e3)), ("riesz", LOGISTIC, logistic(1e3)), ("dpo", LOGISTIC, logistic(1e3)),
    ("dro", HINGE, hinge(.02)), ("dro", LOGISTIC, logistic(1e3)), ("sft", HINGE, gated(.02))],
    ids=["dp2o", "hinge", "adversary", "given", "riesz", "dpo", "dro", "own-logistic", "nobody"])
def test_the_loss_of_one_pair_is_the_link_of_its_margin(runs, setting, changes, loss):
    "From the log's own gaps, also where the policy has left its reference"
    log = log_of(runs.run(setting, True, below("loop", dict(steps=4, lr=3e-2)) | dict(batch=1) | changes))
    want, still = loss(log), loss(log.assign(gap_w=0., gap_l=0., drift=0.))
    check_close(log.loss.tolist(), want.tolist(), rtol=1e-4, atol=1e-7)
    assert (want-still).abs().max() > 1e-2*still.max() # the margin is large enough to see another kappa


def test_the_safeguard_is_asked_where_it_is_named(runs):
    held, free = (log_of(runs.run("dp2o", True, {"method.safeguard": o})) for o in (True, False))
    assert "safeguard" not in free and held.safeguard.between(0, 1).all()


@pytest.mark.parametrize("safeguard, want", [(True, [1-5/6, .5-5/6]), (False, [0., -.5])])
def test_the_losers_gradient_is_scaled_by_the_safeguard(safeguard, want):
    "Gradients (1, 1/2) of the winner and -(1, 1) of the loser: their product is -3/2, the square of the first 5/4"
    net = torch.nn.Linear(2, 1, bias=False)
    gap_w, gap_l = net(torch.tensor([[1., .5]])), net(torch.tensor([[1., 1.]]))
    logs = split_backward(SimpleNamespace(net=net), safeguard)((gap_w-gap_l)[:, 0], {}, gap_w, gap_l)
    check_close(net.weight.grad[0], torch.tensor(want), atol=1e-6)
    if safeguard: check_close(logs["safeguard"], 5/6, atol=1e-6)


def test_the_losses_of_a_network_from_patches_are_the_sums_of_their_parts(runs):
    log = log_of(runs.base("base"))
    check_close(log.loss.tolist(), (log.flow+log["mean"]).tolist(), rtol=1e-5)
    log = log_of(runs.base("ctmsr"))
    check_close(log.loss.tolist(), (log.consistency+1.6*log.match.fillna(0.)).tolist(), rtol=1e-5)
    assert log.stage.tolist() == [1, 1, 2, 2] and (log.match[2:] > 0).all()


class Grey: # photographs of one grey, z = 0 and y = 0, so that a state is its noise alone
    def batch(self, n, patch, g): return (torch.full((n, 3, side, side), .5) for side in (patch//4, patch))


class Zero(torch.nn.Module): # answers 0, and remembers the states that it was asked about, in units of their noise
    def __init__(self):
        super().__init__()
        self.weight, self.asked = torch.nn.Parameter(torch.zeros(())), []
    def forward(self, x, sigma, lq):
        self.asked.append(x/sigma[:, None, None, None])
        return self.weight*x


def test_the_two_trajectories_share_their_noise_and_it_is_not_that_of_the_consistency_loss():
    policy, run = Policy(Zero(), Shift(), Shift(), PixelCodec()), CTMSRRun("x", patch=32, window=16, batch=2)
    def lpips(a, b): return (a-b).square().mean((1, 2, 3))
    onestep_loss(Grey(), policy, run, lpips, Match("dtm"), lambda step: policy)(0, 0)
    first, *_, a, b = policy.net.asked
    check_close(a, b, atol=1e-5)
    assert (a-first).abs().mean() > .5 and (a[0]-a[1]).abs().mean() > .5


# ---------------------------------------------------------------- leaks

def seen_by(w, source, top, photos):
    "A copy of a policy's folder that says that it was trained on these photographs"
    policy = from_pretrained(w[source])
    save_pretrained(policy, top)
    (top/"photos.json").write_text(json.dumps([p.sha256 for p in photos]))
    return str(top)


LEAKS = [(s, "base.backbone", "tiny") for s in ("dp2o", "asasr", "dro", "dpo", "sft")]


@pytest.mark.parametrize("setting, path, source", [*LEAKS, ("continued", "init", "onestep")])
def test_a_run_refuses_a_photograph_that_its_base_has_seen(runs, tmp_path, setting, path, source):
    "Among those to report on, and before anything is written; a base that has seen others is taken"
    held, others = (find_photos(runs.world[n]) for n in ("held", "others"))
    base = seen_by(runs.world, source, tmp_path/"base", [*others, held[1]])
    run = runs.make(setting, changes={path: base})
    with pytest.raises(ValueError, match=f"{held[1].id}.* was in the training of"): train(run)
    assert not (runs.top/f"run{runs.begun}").exists()
    seen_by(runs.world, source, tmp_path/"base", others)
    if setting in ("dp2o", "continued"): train(run)


@pytest.mark.parametrize("setting, source", [("warm", "tiny"), ("continued", "onestep")])
def test_what_a_network_has_seen_it_has_seen_for_ever(runs, tmp_path, setting, source):
    train_on, others = (find_photos(runs.world[n]) for n in ("train", "others"))
    out = train(runs.make(setting, changes=dict(init=seen_by(runs.world, source, tmp_path/"base", others))))
    assert json.loads((out/"policy"/"photos.json").read_text()) == sorted(p.sha256 for p in (*train_on, *others))


def test_a_base_is_not_judged_by_what_it_has_seen(runs):
    "A run notes what it trained on; the photographs that ship as held out are refused as training photographs"
    out = runs.base("base")[0]
    photos = find_photos(runs.world["train"])
    assert json.loads((out/"policy"/"photos.json").read_text()) == sorted(p.sha256 for p in photos)
    with pytest.raises(ValueError, match="was in the training of"):
        evaluate_base(out, Data(held_out=(runs.world["train"],), size=64))
    with pytest.raises(ValueError, match="held out"):
        train(runs.make("base", changes=dict(photos=(str(embedded_photos("held_out")[0].path.parent),))))


@pytest.mark.parametrize("setting, path", [*((s, "data.held_out") for s in ("dp2o", "asasr", "dro", "dpo", "sft")),
                                           ("ctmsr", "held_out")])
def test_a_run_refuses_to_report_on_what_it_trains_on(runs, setting, path):
    with pytest.raises(ValueError, match="same file"): train(runs.make(setting, changes={path: (runs.world["train"],)}))


# ---------------------------------------------------------------- the average of the weights is what a run leaves

ADAPTER = "adapter/adapter_model.safetensors"


def as_peft(weights): # as PEFT names them, without the adapter's own name
    return {re.sub(r"\.(policy|reference|adversary)\.", ".", n): v for n, v in weights.items()}


def weights_of(file): return as_peft(load_file(file))


def left_by(folder): # average, and weights of the last step, in a stage's checkpoint
    state = torch.load(latest_checkpoint(folder)/"state.pt")
    return as_peft(state["average"]), as_peft(state["changing"])


@pytest.mark.parametrize("setting, stages", [ # stage: path of its loop, its folder, what it wrote
    ("base", [("loop", "", "policy/model.safetensors")]), ("dp2o", [("loop", "", ADAPTER)]),
    ("asasr", [("loop", "", ADAPTER), ("method.start.start_loop", "reference", ADAPTER),
               ("method.losers.imitation", "reference-adversary-3-0", ADAPTER)]),
    ("dro", [("loop", "", ADAPTER)]), ("ctmsr", [("match.match_loop", "stage2", "../policy/model.safetensors")])])
def test_what_a_run_leaves_is_the_average_and_not_the_last_step(runs, setting, stages):
    out, _, _ = runs.run(setting, False, {f"{path}.ema": .9 for path, _, _ in stages})
    for _, stage, file in stages:
        kept, (average, last) = weights_of(out/stage/file), left_by(out/stage)
        assert average and set(average) <= set(kept)
        assert all(torch.equal(kept[n], v) for n, v in average.items())
        assert any(not torch.equal(kept[n], last[n]) for n in average)


def test_stage_2_starts_from_the_average_of_stage_1(runs):
    "And its teacher is that average"
    out = runs.run("ctmsr", False, {"loop.ema": .9, "match.match_loop.lr": 1e-12})[0]
    average, last = left_by(out/"stage1")
    written = load_file(out/"policy"/"model.safetensors")
    for n, v in average.items(): check_close(written[n], v, atol=1e-6)
    assert max((last[n]-v).abs().max() for n, v in average.items()) > 1e-4


# ---------------------------------------------------------------- fit: one weight, a linear loss, a path known by hand

SLOPES = [.3, -2., .05, 4., -.1, 1.] # of the loss in the weight, step by step
FACTORS = [.5, 1., 1., 1., 2/3, 1/3] # of the rate: two steps of warm-up, and a fall over the last half
TOY = Loop(steps=6, lr=.1, warmup=2, decay=.5, weight_decay=.2, clip=1., save_every=2, log_every=1, keep_every=1)


def adamw(slopes, factors=FACTORS, w=.5, lr=.1, decay=.2, clip=1.):
    "Weights after each step of AdamW (betas .9 and .999, eps 1e-8) with the gradient's norm bounded"
    m, v, path = 0., 0., []
    for k, g in enumerate(slopes, 1):
        g *= min(1., clip/(abs(g)+1e-6))
        m, v, rate = .9*m+.1*g, .999*v+.001*g*g, lr*factors[k-1]
        w -= rate*decay*w
        w -= rate*(m/(1-.9**k))/((v/(1-.999**k))**.5+1e-8)
        path.append(w)
    return path


class Sum: # remembers the slopes that it was asked for
    def __init__(self): self.total = torch.zeros(1)
    def tensors(self): return dict(total=self.total.clone())
    def restore(self, tensors): self.total = tensors["total"].clone()


def scheduled(step, part): return SLOPES[step]


def toy(top, loop=TOY, slope=scheduled, backward=None, stop=None, shape=(1, 1), memory=None):
    "Fit a weight of .5 to slope*weight, the mean of two samples: the weights that come back, log, kept weights, calls"
    owner, calls = SimpleNamespace(net=torch.nn.Linear(*shape, bias=False)), []
    torch.nn.init.constant_(owner.net.weight, .5)
    def loss(step, part):
        if step == stop: raise KeyboardInterrupt
        calls.append((step, part))
        if memory: memory.total += slope(step, part)
        values = owner.net(torch.tensor([[.5], [1.5]]).expand(2, shape[0])).mean(1)*slope(step, part)
        return values, dict(part=float(part)), *(["apart"] if backward else [])
    weights, log = fit(owner, loss, loop, top, backward, memory)
    assert torch.equal(owner.net.weight, weights["weight"]) # what comes back is what the network then has
    kept = {int(f.stem): load_file(f)["weight"].mean().item() for f in sorted((top/"kept").glob("*.safetensors"))}
    return weights["weight"].mean().item(), log, kept, calls


def test_a_weights_path_is_that_of_adamw_with_clipped_gradients_and_scheduled_rates(tmp_path):
    last, log, kept, calls = toy(tmp_path)
    assert list(kept) == [1, 2, 3, 4, 5, 6] and calls == [(k, 0) for k in range(6)]
    check_close(list(kept.values()), adamw(SLOPES), rtol=1e-5)
    check_close(last, kept[6])
    check_close(log.grad_norm.tolist(), [abs(o) for o in SLOPES], rtol=1e-5) # before it is bounded
    check_close(log.loss.tolist(), [g*w for g, w in zip(SLOPES, [.5, *adamw(SLOPES)[:5]], strict=True)], rtol=1e-5)
    for wrong in (dict(clip=1e9), dict(decay=0.), dict(factors=[1.]*6), dict(factors=[*FACTORS[1:], 0.])):
        assert max(abs(a-b) for a, b in zip(adamw(SLOPES, **wrong), kept.values(), strict=True)) > 1e-3, wrong


def own(values, logs, apart): # a backward of the caller's own
    values.mean().backward()
    return dict(logs, own=float(apart == "apart"))


@pytest.mark.parametrize("backward", [None, own], ids=["mean", "own"])
def test_the_micro_batches_of_a_step_are_apart_and_averaged(tmp_path, backward):
    "With the loop's backward, and with one of the caller's own"
    spread = [-.2, .3, .5]
    _, log, kept, calls = toy(tmp_path, replace(TOY, parts=3), lambda step, part: SLOPES[step]+spread[part], backward)
    assert calls == [(k, p) for k in range(6) for p in range(3)]
    check_close(log.grad_norm.tolist(), [abs(o+.2) for o in SLOPES], rtol=1e-5)
    check_close(list(kept.values()), adamw([o+.2 for o in SLOPES]), rtol=1e-5)
    assert (log.part == 1.).all() and ("own" in log) == (backward is own) # logs are means over the parts
    if backward: assert (log.own == 1.).all()


def test_the_average_is_what_comes_back(tmp_path):
    "decay min(.8, (1+k)/(10+k)) of the path's weights, from the first"
    last, _, kept, _ = toy(tmp_path, replace(TOY, ema=.15))
    average = .5
    for k, w in enumerate(kept.values()):
        d = min(.15, (1+k)/(10+k))
        average = d*average + (1-d)*w
    check_close(last, average, rtol=1e-5)
    check_close(list(kept.values()), adamw(SLOPES), rtol=1e-5) # what is kept is the path itself
    assert abs(average-kept[6]) > 1e-4


def left(top, memory=None, **changes):
    "What a loop leaves that is stopped before step 5 and goes on"
    loop, shape = replace(TOY, **changes), (64, 128) if changes.get("optimiser") else (1, 1)
    def slope(step, part): return SLOPES[step % 6]*(1+part)
    with pytest.raises(KeyboardInterrupt): toy(top, loop, slope, stop=min(5, loop.steps-1), shape=shape, memory=memory)
    saved = latest_checkpoint(top)
    last, log, kept, calls = toy(top, loop, slope, shape=shape, memory=Sum() if memory else None)
    return dict(last=last, log=log.to_dict("list"), kept=kept, calls=calls, saved=saved.name if saved else None,
                tracked=(top/"logs").exists())


LOOP = dict( # field -> another value, what it changes
    steps=(4, "calls"), lr=(.2, "kept"), warmup=(1, "kept"), decay=(.25, "kept"), parts=(2, "calls"),
    weight_decay=(0., "kept"), clip=(.5, "kept"), ema=(.9, "last"), save_every=(3, "saved"), log_every=(2, "log"),
    keep_every=(2, "kept"), optimiser=("adamw_8bit", "kept"), log_with=("none", "tracked"))


def test_every_field_of_a_loop_has_an_entry():
    assert {f.name for f in fields(Loop)} == set(LOOP)


@pytest.mark.parametrize("field", LOOP)
def test_every_field_of_a_loop_changed_alone_changes_what_fit_does(tmp_path, field):
    value, where = LOOP[field]
    change = dict(optimiser="adamw") if field == "optimiser" else {}
    before, after = left(tmp_path/"a", **change), left(tmp_path/"b", **{field: value})
    assert before[where] != after[where]
    if field == "save_every": assert (before["saved"], after["saved"]) == ("checkpoint-00000004", "checkpoint-00000003")
    if field == "log_every": # rows are means over their steps
        rows = torch.tensor(before["log"]["loss"]).view(3, 2).mean(1)
        check_close(after["log"]["loss"], rows, rtol=1e-6)
        assert after["log"]["step"] == [2, 4, 6]


@pytest.mark.parametrize("ema, log_every", [(0., 1), (.9, 1), (0., 3)])
def test_a_loop_that_was_stopped_goes_on_as_if_it_was_not(tmp_path, ema, log_every):
    "Weights, average, log, also of a row that began before the checkpoint, and what the loss remembers"
    memory, loop = Sum(), replace(TOY, ema=ema, log_every=log_every)
    last, log, kept, _ = toy(tmp_path/"whole", loop, memory=memory)
    with pytest.raises(KeyboardInterrupt): toy(tmp_path/"cut", loop, stop=5, memory=Sum())
    again = Sum()
    last_cut, log_cut, kept_cut, calls = toy(tmp_path/"cut", loop, memory=again)
    assert calls == [(4, 0), (5, 0)] and (last, kept) == (last_cut, kept_cut) and log.equals(log_cut)
    assert torch.equal(memory.total, again.total)


def test_the_last_step_is_logged_and_saved_whatever_the_intervals(tmp_path):
    loop = replace(TOY, steps=5, save_every=2, log_every=2)
    last, log, _, _ = toy(tmp_path, loop)
    assert log.step.tolist() == [2, 4, 5] and latest_checkpoint(tmp_path).name == "checkpoint-00000005"
    again, same, _, calls = toy(tmp_path, loop)
    assert calls == [] and again == last and log.equals(same) # done: nothing is asked again


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    def slope(step, part): return [1., 1., math.nan][step]
    with pytest.raises(FloatingPointError, match="step 2"): toy(tmp_path, slope=slope)


class Trap: # what a pickle may hold: a call
    def __reduce__(self): return Path.touch, (Path("sprung"),)


def test_a_checkpoint_is_read_without_running_what_it_holds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt): toy(tmp_path, stop=5)
    torch.save(dict(step=Trap()), latest_checkpoint(tmp_path)/"state.pt")
    with pytest.raises(pickle.UnpicklingError): toy(tmp_path)
    for f in latest_checkpoint(tmp_path).glob("*.bin"): torch.save(dict(state=Trap()), f)
    with pytest.raises(pickle.UnpicklingError): toy(tmp_path)
    assert not Path("sprung").exists()

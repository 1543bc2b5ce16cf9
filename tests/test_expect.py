"What people expect of a trainer: trackers, pictures as it goes, half precision, versions in the records"
import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pandas as pd
import peft
import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from transformers import CLIPTextModel

from srnb.align import Method, Own, Run, align
from srnb.backbones import BackboneOptions, load_backbone, write_tiny, write_tiny_control
from srnb.core import generator, open_run, seed_of, write_table
from srnb.data import embedded_photos
from srnb.metrics import interval
from srnb.nets import SmallUNet, UNetConfig
from srnb.pairs import Hinge
from srnb.policies import Policy, load_adapter, save_pretrained
from srnb.release import write_card
from srnb.runs import Base, Data, Judging
from srnb.training import Loop, fit, log_pictures

LOOP = Loop(steps=8, lr=1e-2, warmup=1, parts=2, ema=.9, save_every=3, log_every=1)


def toy(dtype=torch.float32, overflow=(), die_at=None): # owner and loss
    owner = SimpleNamespace(net=torch.nn.Linear(4, 3), dtype=dtype)
    owner.net.load_state_dict(dict(weight=torch.eye(4)[:3], bias=torch.zeros(3)))
    def loss(step, part):
        if step == die_at: raise KeyboardInterrupt("killed")
        x = torch.randn(8, 4, generator=generator(seed_of("toy", step, part)))
        values = (owner.net(x)-x[:, :3].flip(1)).square().mean(1)
        return values*(1e36 if step in overflow and part == 1 else 1.), {} # finite, but its scaled gradient is not
    return owner, loss


def test_every_tracker_of_accelerate(tmp_path):
    "Each has a name in `Loop.log_with`; a missing package is one sentence, before anything is written"
    kinds = set(get_args(get_type_hints(Loop)["log_with"]))
    assert kinds == {*LOGGER_TYPE_TO_CLASS, "none"}
    with pytest.raises(ValueError, match="Loop.log_with: there is no 'wandbb'; did you mean 'wandb'"):
        Loop(log_with="wandbb")
    from accelerate.tracking import get_available_trackers
    missing = min(kinds-{"none", *map(str, get_available_trackers())})
    with pytest.raises(ValueError, match=f"Loop.log_with = '{missing}'.*pip install.*tensorboard"):
        fit(*toy(), replace(LOOP, log_with=missing), tmp_path/"out")
    assert not (tmp_path/"out").exists()
    fit(*toy(), replace(LOOP, log_with="none"), tmp_path/"none")
    assert not (tmp_path/"none/logs").exists()


def test_pictures_at_every_checkpoint(tmp_path):
    "`show` is called after a checkpoint with the step and the trackers, and does not change what is learnt"
    steps = []
    def show(step, trackers):
        steps.append(step)
        log_pictures(trackers, {"held out/a": torch.full((3, 6, 8), .2)}, step)
    shown, _ = fit(*toy(), LOOP, tmp_path/"shown", show=show)
    plain, _ = fit(*toy(), LOOP, tmp_path/"plain")
    assert steps == [3, 6, 8] and all(torch.equal(shown[n], plain[n]) for n in plain)
    events = EventAccumulator(str(tmp_path/"shown/logs")).Reload()
    images = events.Images("held out/a")
    assert [o.step for o in images] == steps and (images[0].height, images[0].width) == (6, 8)


def test_half_precision_skips_what_overflows(tmp_path):
    "Steps whose scaled gradient overflows are skipped and the scale halved; a resumed run does the same, bit for bit"
    half = torch.float16
    with pytest.raises(KeyboardInterrupt): fit(*toy(half, (2, 4), die_at=5), LOOP, tmp_path/"killed")
    again, log_b = fit(*toy(half, (2, 4)), LOOP, tmp_path/"killed")
    whole, log = fit(*toy(half, (2, 4)), LOOP, tmp_path/"whole")
    assert all(torch.equal(again[n], whole[n]) for n in whole) and log.equals(log_b)
    assert log.skipped.tolist() == [0, 0, 1, 0, 1, 0, 0, 0] and log.loss_scale.iloc[-1] == 2.**14
    assert log.grad_norm.isna().tolist() == [bool(o) for o in log.skipped]
    owner, loss = toy(half)
    owner.net.weight.register_hook(lambda grad: grad/0)
    with pytest.raises(FloatingPointError, match="overflow.*bf16"):
        fit(owner, loss, replace(LOOP, steps=40), tmp_path/"lost")


def test_half_precision_learns_the_same(tmp_path):
    "Where nothing overflows, a scale that is a power of two changes no bit"
    half, single = (fit(*toy(o), LOOP, tmp_path/str(o))[0] for o in (torch.float16, torch.float32))
    assert all(torch.equal(half[n], single[n]) for n in single)


@pytest.mark.parametrize("cards,said", [(["H200"]*2+["L4"], "2 × H200, 1 × L4"), ([], "; no GPU\n")])
def test_records_name_the_gpus(tmp_path, monkeypatch, cards, said):
    "Versions, GPUs and processes are in a run's record, and a model's card prints them"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda k: cards[k])
    monkeypatch.setenv("WORLD_SIZE", "6")
    out = open_run(tmp_path/"run", dict(seed=0))
    config = json.loads((out/"config.json").read_text())
    assert config["gpus"] == dict(Counter(cards)) and config["processes"] == 6
    assert {"diffusers", "transformers", "peft", "accelerate"} <= set(config["versions"])
    write_table(out/"metrics.parquet", pd.DataFrame(dict(image=["a", "b"], seed=0, metric="psnr_y", variant="after",
                                                         value=[1., 2.])))
    save_pretrained(Policy(SmallUNet(UNetConfig((16, 16), (1, 1), 16, 16, 1))), tmp_path/"policy")
    write_card(tmp_path/"policy", out, interval, "owner/name", "cc0-1.0", "photographs", "much", against=None)
    assert said in (tmp_path/"policy/README.md").read_text()


@pytest.mark.parametrize("names,said", [
    (["lora_unet_down_blocks_0.lora_down.weight", "lora_te_text_model.lora_up.weight"],
     "kohya's layout, also for text encoders"),
    (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "kohya's layout, and"),
    (["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"],
     "diffusers' layout, also for text encoders"),
    (["transformer.x_embedder.lora_A.weight", "transformer.x_embedder.lora_B.weight"], "diffusers' layout, and")])
def test_foreign_adapters(sd, tmp_path, names, said):
    "As a file and as a folder: what it is, what the rule is, what to do; nothing is changed"
    folder, options = sd
    policy = load_backbone(folder, options)
    (tmp_path/"lora").mkdir()
    save_file({n: torch.zeros(2, 2) for n in names}, tmp_path/"lora/my.safetensors")
    for place in (tmp_path/"lora", tmp_path/"lora/my.safetensors"):
        with pytest.raises(ValueError, match=f"my.safetensors is a LoRA in {said}.*fuse_lora.*as backbone.*Omini"):
            load_adapter(policy, place)
    assert not policy.adapters
    save_file(dict(weight=torch.zeros(2)), tmp_path/"lora/my.safetensors")
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"): load_adapter(policy, tmp_path/"lora")


def test_an_adapter_of_another_model(sd, tmp_path):
    "PEFT's own folder of a text encoder's adapter: the network and the base that it names are said"
    folder, options = sd
    encoder = CLIPTextModel.from_pretrained(folder/"text_encoder")
    encoder = peft.get_peft_model(encoder, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    encoder.peft_config["default"].base_model_name_or_path = "openai/clip"
    encoder.save_pretrained(tmp_path/"adapter", save_embedding_layers=False)
    with pytest.raises(ValueError, match="adapter does not fit this network: it was trained on openai/clip, load it"):
        load_adapter(load_backbone(folder, options), tmp_path/"adapter")


@pytest.fixture(scope="module")
def sd(tmp_path_factory): # a random pipeline and its control branch
    top = tmp_path_factory.mktemp("sd")
    control = write_tiny_control(load_backbone(write_tiny("sd", top/"sd")), top/"control")
    return top/"sd", BackboneOptions(control=str(control))


def test_run_in_half_precision_shows_pictures(sd, tmp_path):
    "A run of DRO, whose gradients are taken apart: adapters in float32, norms without the scale, pictures as it goes"
    folder, options = sd
    loop = Loop(steps=2, lr=1e-2, warmup=1, log_every=1, save_every=1)
    run = Run(str(tmp_path/"half"), Method(losers=Own(2, 2, 2, 2), link=Hinge(.001)), Data(size=64, places=1, take=2),
              Base(str(folder), precision="fp16", sample_steps=2, options=options),
              Judging(None, judges=("psnr_y",), eval_m=1, show=1), loop, rank=4, batch=2, patch=64)
    out = align(run)
    single = align(replace(run, out=str(tmp_path/"single"), base=replace(run.base, precision="no")))
    logs = [pd.read_parquet(o/"log.parquet") for o in (out, single)]
    assert logs[0].loss_scale.tolist() == [2.**16]*2 and not logs[0].skipped.any()
    for n in ("norm_w", "grad_norm"): assert (logs[0][n]/logs[1][n]-1).abs().max() < .05
    assert {o.dtype for o in load_file(out/"adapter/adapter_model.safetensors").values()} == {torch.float32}
    photo = embedded_photos("held_out")[0].id
    images = EventAccumulator(str(out/"logs")).Reload().Images(f"held out/{photo}")
    assert [(o.step, o.height, o.width) for o in images] == [(1, 64, 192), (2, 64, 192)]
    load_adapter(load_backbone(folder, options, dtype=torch.float16), out/"adapter")
    with pytest.raises(ValueError, match="in float16.*read as it was"):
        load_adapter(load_backbone(folder, options), out/"adapter")

"Memory and FLOPs before loading: properties over tiny architectures"
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from srnb.plan import (FLUX, GB, SD2, SDXL, DoesNotFit, Network, Tally, Training, adapt, asasr_layers, cost, largest,
                       measure, plan)

TEXT = (Network("transformers", "T5EncoderModel", dict(d_model=32, d_ff=64, d_kv=16, num_heads=2, num_layers=1,
                                                       vocab_size=99)), 7),
VAE = Network("diffusers", "AutoencoderKL", dict(block_out_channels=(8,)*4, norm_num_groups=4, sample_size=64,
    down_block_types=("DownEncoderBlock2D",)*4, up_block_types=("UpDecoderBlock2D",)*4))
UNET = replace(SD2, name="tiny UNet", texts=TEXT, vae=VAE, denoiser=Network("diffusers", "UNet2DConditionModel", dict(
    block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), layers_per_block=1,
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32, attention_head_dim=2,
    norm_num_groups=8)))
TRANSFORMER = replace(FLUX, name="tiny FLUX", texts=TEXT, vae=VAE, denoiser=Network("diffusers",
    "FluxTransformer2DModel", dict(guidance_embeds=True, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6))))
BOTH = pytest.mark.parametrize("architecture", [UNET, TRANSFORMER], ids=lambda a: a.name)
WAYS = [None, Training(rank=4), Training(rank=4, checkpointing=True),
        Training(None, checkpointing=True, eight_bit=True)]


@BOTH
@pytest.mark.parametrize("training", [WAYS[0], *WAYS[2:]])
def test_more_pixels_and_more_rows_need_more(architecture, training):
    def step(*a): # before the text encoder or the VAE is the largest
        p = plan(architecture, *a, training)
        return p.momentary["activations"], p.flops, p.bytes
    small, wide, many = step(64, 1), step(128, 1), step(64, 3)
    assert all(a < b for a, b in zip(small[:2], wide[:2], strict=True)) and small[2] <= wide[2]
    assert many[:2] == tuple(3*o for o in small[:2]) and small[2] <= many[2]


@BOTH
def test_checkpointing_saves_memory_and_costs_work(architecture):
    flat, deep = cost(architecture, 128, WAYS[1]), cost(architecture, 128, WAYS[2])
    assert deep.saved < flat.saved and deep.peak < flat.peak and deep.flops > flat.flops


@BOTH
def test_options_change_what_they_say(architecture):
    whole = Training(None, checkpointing=True)
    a, b = [plan(architecture, 64, 1, replace(whole, eight_bit=e)) for e in (False, True)]
    assert {k for k in a.resident if a.resident[k] != b.resident[k]} == {"AdamW"}
    assert b.resident["AdamW"] < a.resident["AdamW"]
    lora = plan(architecture, 64, 1, replace(whole, adapts=WAYS[1].adapts, rank=1))
    assert lora.resident["AdamW"] < a.resident["AdamW"]
    assert plan(architecture, 64, 1, replace(whole, frozen=1)).flops < a.flops


def test_flops_of_a_layer_by_hand():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 7, device="meta"), nn.Conv2d(3, 4, 3, padding=1, device="meta")
    net, g = Net().requires_grad_(False), dict(device="meta")
    assert measure(lambda: net.a(torch.zeros(11, 5, **g))).flops == 2*11*5*7
    assert measure(lambda: net.b(torch.zeros(2, 3, 6, 8, **g))).flops == 2*2*6*8*4*3*9
    r, found = 2, adapt({"denoiser": net}, Training(lambda n: True, rank=2))
    assert sum(p.numel() for p in found) == r*(5+7)+r*(3*9+4)
    forward = 2*11*(5*7+r*(5+7))
    assert measure(lambda: net.a(torch.zeros(11, 5, **g))).flops == forward
    backward = 2*11*r*(5+7)+2*11*r*7 # of the adapter's weights, and of what lies between them
    assert measure(lambda: net.a(torch.zeros(11, 5, **g)), True).flops == forward+backward


def test_asasr_layers_hold_what_the_release_adapts():
    net = FLUX.denoiser.build()
    found = adapt({"denoiser": net}, Training(asasr_layers, rank=16))
    assert sum(p.numel() for p in found) == 57_951_232 # in bf16 110.5 MiB, its file has 111 MB


@BOTH
def test_largest_is_largest(architecture):
    one = plan(architecture, 128, 1, WAYS[2], allowance=0)
    capacity = max(one.bytes, sum(one.resident.values())+int(3.5*one.momentary["activations"]))
    got = largest(architecture, 128, capacity, [WAYS[2]], allowance=0)
    assert got.bytes <= capacity < plan(architecture, 128, got.batch+1, WAYS[2], allowance=0).bytes
    assert str(got).startswith(f"{architecture.name} at 128²: {got.batch} pair(s), LoRA of rank 4, checkpointing")
    with pytest.raises(DoesNotFit, match="needs .* What to change"): largest(architecture, 128, 1000, WAYS[1:])


def test_the_first_way_that_fits():
    flat, deep = [plan(TRANSFORMER, 128, 1, w, 64, 0).bytes for w in WAYS[1:3]]
    assert deep < flat
    assert largest(TRANSFORMER, 128, flat, WAYS[1:3], 64, 0).training == WAYS[1]
    assert largest(TRANSFORMER, 128, flat-1, WAYS[1:3], 64, 0).training == WAYS[2]


def test_the_scaling_page_holds_what_is_counted(root):
    kept = json.loads((root/"nbs/_records/scaling/costs.json").read_text())["C-SD2"]
    assert cost(SD2, 512).flops == kept["forward"]


def test_pooled_text_of_sdxl():
    assert 2*SDXL.denoiser.build().add_embedding.linear_1.in_features == 2*2816


@pytest.mark.parametrize("bad, words", [(dict(size=100), "multiple of 64"), (dict(size=0), "multiple of 64"),
    (dict(batch=0), "batch must"), (dict(tile=100), "tile must")])
def test_bad_input(bad, words):
    with pytest.raises(ValueError, match=words): plan(**{"architecture": UNET, "size": 64, **bad})


def test_no_way():
    with pytest.raises(ValueError, match="at least one way"): largest(UNET, 64, GB, [])
    with pytest.raises(ValueError, match="frozen must"): Training(frozen=-1)


def test_tally_counts_what_is_made_inside_and_lives():
    given = torch.zeros(1000)
    with Tally() as made:
        view = given.view(10, 100)
        view.add_(1) # neither a view nor what is written in place is new
        kept = view.t()
        assert made.now == 0
        for _ in range(3): kept = given*2 # the last one dies when the next is there
        kept = kept[:10]
    assert (made.now, made.peak, made.flops) == (4000, 8000, 0) and kept.shape == (10,)
    del kept
    assert made.now == 0

"Numbers of the rooms below 40: presets, directions, weights and rewards by hand, scalings, golden values"
import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch

from srnb import rewards
from srnb.core import check_close, generator, seed_of
from srnb.curation import group_seeds, hpo_weights, inter_weight, intra_weight, top_bottom
from srnb.data import centre_crop, embedded_photos, make_pair
from srnb.degrade import RESSHIFT_TEST, RESSHIFT_TRAIN, SEESR, degrade
from srnb.nets import SmallUNet, UNetConfig
from srnb.paths import Shift
from srnb.policies import Policy, layers_of, load_adapter, save_adapter
from srnb.rewards import LADDER, Metric, hybrid, ladder_images, orient, score

# ---------------------------------------------------------------- degradations: every number, and what they make

ONLY_GAUSSIAN, MIXED = (.6, .4, 0., 0., 0., 0.), (.45, .25, .12, .03, .12, .03)


def odd(low, high): return tuple(range(low, high+1, 2))


def blur(sizes, shapes, sigma):
    ranges = dict(beta_generalised=(.5, 4.), beta_plateau=(1., 2.))
    return dict(sizes=sizes, shapes=shapes, sigma=sigma, sinc_prob=.1, **ranges)


def stage(blur, resize, gaussian, poisson, blur_prob=1., resize_probs=(.2, .7, .1)):
    return dict(blur=blur, resize=resize, gaussian=gaussian, poisson=poisson, blur_prob=blur_prob,
                resize_probs=resize_probs, gaussian_prob=.5, grey_prob=.4)


LATER = .3, .4, .3 # up, down, keep, of a second stage
FROZEN = dict( # as the releases of ResShift and SeeSR have them
    resshift_test=dict(
        first=stage(blur(odd(3, 11), ONLY_GAUSSIAN, (.2, .8)), (.5, 1.5), (1., 15.), (.05, .3)),
        jpeg=(70, 95), final_jpeg=(80, 100), final_sinc_prob=.2, final_sinc_sizes=odd(3, 5),
        second=None, second_prob=0.),
    resshift_train=dict(
        first=stage(blur(odd(3, 19), MIXED, (.2, 3.)), (.15, 1.5), (1., 30.), (.05, 3.)),
        jpeg=(30, 95), final_jpeg=(30, 95), final_sinc_prob=.8, final_sinc_sizes=odd(3, 13),
        second=stage(blur(odd(3, 13), MIXED, (.2, 1.5)), (.3, 1.2), (1., 25.), (.05, 2.5), .8, LATER), second_prob=.5),
    seesr=dict(
        first=stage(blur(odd(7, 21), MIXED, (.2, 3.)), (.3, 1.5), (1., 15.), (.05, 2.)),
        jpeg=(60, 95), final_jpeg=(60, 100), final_sinc_prob=.8, final_sinc_sizes=odd(7, 21),
        second=stage(blur(odd(7, 21), MIXED, (.2, 1.5)), (.6, 1.2), (1., 12.), (.05, 1.), .5, LATER), second_prob=1.))
PRESETS = {d.name: d for d in (RESSHIFT_TEST, RESSHIFT_TRAIN, SEESR)}


@pytest.mark.parametrize("name", FROZEN)
def test_a_presets_numbers_are_those_of_the_release(name):
    assert asdict(PRESETS[name]) == dict(FROZEN[name], name=name)


def thumbnails(name): # of four degraded pictures: the green channel in 4x4 means, as hexadecimal bytes
    y, x = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 32), indexing="ij")
    picture = torch.stack([x, ((x*5).floor()+(y*3).floor()) % 2, y]).mul(255).round().div(255)
    lq = torch.stack([degrade(picture, PRESETS[name], generator(seed_of(name, k))) for k in range(4)])
    return torch.nn.functional.avg_pool2d(lq[:, 1:2], 2).mul(255).round().byte().flatten(1)


GOLDEN = dict(
    resshift_test=("1b858718937c808e8e7e7e921d84871c", "2fa5a5509674728f9074768d469d9a5e",
                   "239b9a429478778e9479788e3a939350", "208c8e28987b7d95987b7a94288b8b32"),
    resshift_train=("4e8486587891787a72897a804c848851", "126e6c1d627e816b60808d741c76801c",
                    "1810152593a0aaaa91a1acaf18162238", "4e796e458772767d8b7c8386548f8959"),
    seesr=("618780727c8680998a818a9069848373", "4484864f7e7e7d84817e7d854e858b5c",
           "6d79817b7982877e7b84877e6d777e77", "35857a5686757981897d767d48808366"))


@pytest.mark.parametrize("name", FROZEN)
def test_a_preset_makes_the_same_pictures_as_ever(name):
    "To two levels of 255: another JPEG library may round differently"
    golden = torch.tensor([list(bytes.fromhex(o)) for o in GOLDEN[name]], dtype=torch.uint8)
    assert (thumbnails(name).int()-golden.int()).abs().max() <= 2


# ---------------------------------------------------------------- directions

def fetched(metric): return any(o in metric.needs for o in ("download", "huggingface"))


LOCAL = [m for m in vars(rewards).values() if isinstance(m, Metric) and not fetched(m)]


@pytest.fixture(scope="module")
def ladders():
    "A photograph and its damaged versions, of two photographs"
    return [ladder_images(centre_crop(p.read(), 192).contiguous()) for p in embedded_photos()[:2]]


def test_the_local_metrics_are_all_there():
    names = {"psnr_y", "ssim_y", "lsd", "st_lpips_alex", "st_lpips_vgg", "cvvdp_standard_4k", "piqe", "gmsd"}
    assert {m.name for m in LOCAL} >= names


@pytest.mark.parametrize("metric", LOCAL, ids=lambda m: m.name)
def test_oriented_so_a_metric_puts_the_photograph_above_its_damaged_versions(ladders, metric):
    rungs = [LADDER.index(o) for o in ("gt", "jpeg10", "noise30", "blur3")]
    good, *bad = orient(torch.stack([score(metric, o[rungs], o[0]) for o in ladders]).mean(0), metric).tolist()
    if metric.kind == "fr": assert good > max(bad)
    else: assert good > sum(bad)/len(bad) # blind: each kind of damage may please it


def test_the_hybrid_reward_of_two_candidates_by_hand():
    "Halves weigh the same, whatever the number of their metrics; each metric from its worst (0) to its best (1)"
    def metric(name, kind, higher): return Metric(name, kind, higher, lambda: None)
    a, b, c = metric("a", "fr", True), metric("b", "fr", False), metric("c", "nr", False)
    scores = dict(a=[1., 3., 2.], b=[10., 30., 40.], c=[5., 6., 7.])
    want = [((0+1)/2+1)/2, ((1+1/3)/2+.5)/2, ((.5+0)/2+0)/2]
    check_close(hybrid(scores, rewards.Reward("r", fr=(a, b), nr=(c,))), want, atol=1e-12)
    frozen = rewards.fit_bounds(dict(a=[0., 4.], b=[0., 50.], c=[5., 9.]), (a, b, c))
    assert frozen.bounds == (("a", 0., 4.), ("b", 50., 0.), ("c", 9., 5.)) # worst, best
    want = [((1/4+4/5)/2+1)/2, ((3/4+2/5)/2+3/4)/2, ((2/4+1/5)/2+2/4)/2]
    check_close(hybrid(scores, rewards.Reward("r", fr=(a, b), nr=(c,)), frozen), want, atol=1e-12)


# ---------------------------------------------------------------- curation

REWARD = torch.tensor([[0., .2, .6, 1.], [.5, .5, .7, .7]], dtype=torch.float64)
WINNERS, LOSERS = torch.tensor([[3, 2], [2, 3]]), torch.tensor([[1, 0], [0, 1]])
# gaps .8, 1, .4, .6, their mean .7
INTRA = torch.tensor([[[1.1, 1.3], [.7, .9]], [[1., 1.], [1., 1.]]], dtype=torch.float64)
# (.45^2+.25^2+.15^2+.55^2)/4 = .1475: divided by M, not by M-1
SPREAD = torch.tensor([.1475**.5, .1], dtype=torch.float64)
INTER = SPREAD+1-SPREAD.mean()


def test_best_and_worst_by_hand():
    "Winners best first, losers worst last; of equals the first comes first"
    w, l = top_bottom(REWARD, 2)
    assert torch.equal(w, WINNERS) and torch.equal(l, LOSERS)


@pytest.mark.parametrize("intra, inter, want", [
    (False, False, torch.ones(2, 2, 2)), (True, False, INTRA), (False, True, INTER[:, None, None].expand(2, 2, 2)),
    (True, True, INTRA*INTER[:, None, None])], ids=["none", "intra", "inter", "both"])
def test_weights_by_hand(intra, inter, want):
    check_close(hpo_weights(REWARD, WINNERS, LOSERS, intra, inter), want, atol=1e-12)


def test_either_level_of_the_weights_by_hand():
    check_close(intra_weight(REWARD.gather(1, WINNERS), REWARD.gather(1, LOSERS)), INTRA, atol=1e-12)
    check_close(inter_weight(REWARD), [1.1420, .8580], atol=1e-4)


def test_seeds_are_those_of_the_committed_records():
    "Names in, numbers out: every bank and every record was drawn with these"
    assert seed_of("astronaut", 0, 1) == GOLDEN_SEEDS[1]
    assert group_seeds("astronaut", 3) == GOLDEN_SEEDS and group_seeds("astronaut", 3, 5) != GOLDEN_SEEDS


GOLDEN_SEEDS = [3270359453445306734, 3996737544282530543, 8828307151065925282]


def test_places_of_a_crop():
    "0 the middle, then the corners in reading order; each place and each draw is degraded by itself"
    photo = embedded_photos("train")[0]
    image = photo.read()
    (h, w), s = image.shape[1:], 64
    corners = [((h-s)//2, (w-s)//2), (0, 0), (0, w-s), (h-s, 0), (h-s, w-s)]
    pairs = [make_pair(photo, s, RESSHIFT_TEST, place=k) for k in range(5)]
    for (_, gt), (y, x) in zip(pairs, corners, strict=True): assert torch.equal(gt, image[:, y:y+s, x:x+s])
    for k, (lq, gt) in enumerate(pairs):
        noise = generator(seed_of(photo.id, "resshift_test", 0, k))
        assert torch.equal(lq, degrade(gt.contiguous(), RESSHIFT_TEST, noise))


# ---------------------------------------------------------------- residual shifting

def test_golden_values_of_residual_shifting():
    "sigma = 0.8 t^2 and share = sqrt(t), so at t = 1/4: sigma = .05, half of the way to y"
    path, sigma = Shift(rho_shift=.5, rho_noise=2., sigma_max=.8), torch.tensor([.05])
    z, y, eps = (torch.full((1, 1, 1, 1), o) for o in (3., 7., -2.))
    given = path.given(y)
    assert path.steps == 1 and Shift() == Shift(1., 1., 1.)
    check_close(path.sigma_grid(4), [.8, .45, .2, .05, 0.], atol=1e-7)
    check_close(path.share(sigma), [.5], atol=1e-6)
    check_close(path.alpha(sigma), [.5], atol=1e-6)
    check_close(given.state(z, eps, sigma), path.state(z, eps, sigma, y), atol=0)
    check_close(given.state(z, eps, sigma).item(), .5*3+.5*7-.05*2, atol=1e-6)
    check_close(given.start(eps).item(), 7-.8*2, atol=1e-6)
    check_close(given.target(z, eps, sigma), z)
    z_hat, eps_hat = given.estimates(torch.full_like(z, 4.9), z, sigma)
    check_close([z_hat.item(), eps_hat.item()], [3., -2.], atol=1e-5)
    check_close(path.draw_sigma(3, generator(0)), .8*torch.rand(3, generator=generator(0))**2, atol=1e-7)
    x, level = given.to_flow(torch.full_like(z, 4.9), sigma) # the same z and eps: (.5 z + .05 eps)/.55
    check_close([x.item(), level.item()], [(1.5-.1)/.55, .05/.55], atol=1e-5)
    straight = Shift(2., 2., .5).given(y)
    x, level = straight.from_flow(torch.full_like(z, .5), torch.tensor([.5])) # (z+eps)/2 at sigma 1/3: share 2/3
    check_close([x.item(), level.item()], [(3-2)/3+7*2/3, 1/3], atol=1e-5)


# ---------------------------------------------------------------- adapters

def toy():
    net, g = SmallUNet(UNetConfig((16, 16), (1, 1), 16)), generator(0)
    with torch.no_grad():
        for p in net.parameters(): p.copy_(torch.randn(p.shape, generator=g)*.1)
    return net


@pytest.mark.parametrize("rank, alpha, scale", [(2, None, 1.), (16, None, 1.), (4, 2., .5)])
def test_an_adapter_adds_b_times_a_scaled_by_alpha_over_rank(tmp_path, rank, alpha, scale):
    "Without alpha the scale is 1, in the network, in the file, and once it is read again"
    policy, g = Policy(toy()), generator(1)
    policy.add_lora(rank, alpha=alpha)
    for _, layer in layers_of(policy.net): layer.lora_B["policy"].weight.data.normal_(0, .1, generator=g)
    save_adapter(policy, tmp_path/"a")
    again = load_adapter(Policy(toy()), tmp_path/"a")
    told = json.loads((tmp_path/"a"/"adapter_config.json").read_text())
    assert told["lora_alpha"]/told["r"] == scale and told["r"] == rank
    for o in (policy, again): assert {layer.scaling["policy"] for _, layer in layers_of(o.net)} == {scale}
    x, sigma, lq = torch.randn(1, 3, 32, 32, generator=g), torch.tensor([.4]), torch.rand(1, 3, 8, 8, generator=g)
    merged = Policy(toy())
    with torch.no_grad():
        for path, layer in layers_of(policy.net):
            a, b = (getattr(layer, o)["policy"].weight for o in ("lora_A", "lora_B"))
            change = torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
            merged.net.get_submodule(path.removeprefix("base_model.model.")).weight.add_(scale*change)
        want = merged.predict(x, sigma, lq)
        for o in (policy, again): check_close(o.predict(x, sigma, lq), want, atol=2e-6*want.abs().max().item())
        assert (want-Policy(toy()).predict(x, sigma, lq)).abs().max() > 1e-3*want.abs().max()


# ---------------------------------------------------------------- backbones

KINDS = ("sd", "sdxl", "flux")


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    "Folders of random pipelines, and of random control branches, whose features are not zero"
    from srnb.backbones import load_backbone, write_tiny, write_tiny_control
    top = tmp_path_factory.mktemp("pipelines")
    for kind in KINDS: write_tiny_control(load_backbone(write_tiny(kind, top/kind)), top/f"{kind}-control")
    return top


def small_image(): return torch.rand(1, 3, 16, 16, generator=generator(0)).mul(255).round().div(255)


def backbone(pipelines, kind, **options):
    from srnb.backbones import BackboneOptions, load_backbone
    options = dict(control=str(pipelines/f"{kind}-control")) | options
    return load_backbone(pipelines/kind, BackboneOptions(**options), prompts=["a tree"])


def diffusers_latents(pipelines, kind, scale, steps=2):
    "What the pipeline of diffusers makes of the image, the prompt and the noise"
    import diffusers

    from srnb.backbones import NEGATIVE, pack, unpack
    name, net = dict(sd=("StableDiffusionControlNetPipeline", "ControlNetModel"),
                     sdxl=("StableDiffusionXLControlNetPipeline", "ControlNetModel"),
                     flux=("FluxControlNetPipeline", "FluxControlNetModel"))[kind]
    control = getattr(diffusers, net).from_pretrained(pipelines/f"{kind}-control")
    more = dict(safety_checker=None) if kind == "sd" else {}
    pipe = getattr(diffusers, name).from_pretrained(pipelines/kind, controlnet=control, **more)
    pipe.set_progress_bar_config(disable=True)
    codec, g = backbone(pipelines, kind).codec, generator(7)
    noise, y = torch.randn(1, *codec.shape(small_image()), generator=g), codec.upsample(small_image())
    told = dict(prompt="a tree", num_inference_steps=steps, generator=g, output_type="latent",
                controlnet_conditioning_scale=scale)
    if kind != "flux":
        return pipe(image=y, latents=noise, guidance_scale=3.5, negative_prompt=NEGATIVE, **told).images
    with torch.no_grad(): # it draws the control image's latents: no variance, no draw
        pipe.vae.encoder.conv_out.weight[4:].zero_()
        pipe.vae.encoder.conv_out.bias[4:] = -30.
    told |= dict(height=y.shape[-2], width=y.shape[-1], guidance_scale=2.5)
    return unpack(pipe(control_image=2*y-1, latents=pack(noise), **told).images, noise.shape)


@torch.no_grad()
def own_latents(policy, steps=2):
    from srnb.policies import text_ids
    g, lq = generator(7), small_image()
    noise, path = torch.randn(1, *policy.codec.shape(lq), generator=g), policy.path_of(lq)
    cond = policy.encode(lq, text_ids(["a tree"]))
    def predict(x, sigma): return policy.guided(x, sigma, cond)
    def draw(x): return torch.randn(x.shape, generator=g)
    return policy.sampler(predict, noise, path.sigma_grid(steps), path, draw)


@pytest.mark.parametrize("kind", KINDS)
def test_control_scale_is_the_conditioning_scale_of_diffusers(pipelines, kind):
    theirs = diffusers_latents(pipelines, kind, .4)
    own, whole = (own_latents(backbone(pipelines, kind, control_scale=o)) for o in (.4, 1.))
    check_close(own, theirs, atol=1e-4*theirs.abs().max().item())
    assert (whole-theirs).abs().max() > 1e-2*theirs.abs().max()


OPTIONS = dict( # field -> kind of pipeline, another value, where it shows
    control=("sd", None, "latents"), guidance=("sd", 2., "latents"), negative=("sd", "a house", "latents"),
    control_scale=("sd", .5, "latents"), train=("sd", "control", "trained"), max_tokens=("flux", 64, "text"),
    texts=("sd", "texts", "texts"), prediction=("sd", "v_prediction", "error"),
    checkpointing=("sd", True, "checkpointing"), tile_vae=("sd", True, "tiling"), levels=("flux", "shifted", "levels"))
ELSEWHERE = dict( # field -> its test in test_backbones.py
    variant="test_variant", quantize="test_packed_base_trains_lora", attention="test_attention",
    compile="test_compiled", offload_vae="test_the_vae_visits_the_device")


def shows(pipelines, kind, **options):
    "What a backbone's options can change"
    from srnb.backbones import BackboneError
    from srnb.policies import text_ids
    try: policy = backbone(pipelines, kind, **options)
    except BackboneError as e: return dict(error=str(e))
    latents, parts = own_latents(policy).tolist(), (getattr(policy.net, policy.net.base_name), policy.net.controlnet)
    text = list(policy.encode(small_image(), text_ids(["a tree"])).text.shape)
    policy.add_lora(2)
    levels = policy.path.draw_sigma(3, generator(0)).tolist()
    return dict(error=None, levels=levels, latents=latents, text=text,
                checkpointing=[o.is_gradient_checkpointing for o in parts],
                tiling=[policy.codec.vae.use_tiling, policy.codec.vae.tile_sample_min_size == 512],
                texts=len(list(Path(options["texts"]).glob("*.safetensors"))) if options.get("texts") else 0,
                trained=[n for n, p in policy.net.named_parameters() if p.requires_grad])


def test_every_option_of_a_backbone_has_an_entry():
    import test_backbones

    from srnb.backbones import BackboneOptions
    assert {f.name for f in fields(BackboneOptions)} == {*OPTIONS, *ELSEWHERE}
    assert all(hasattr(test_backbones, test) for test in ELSEWHERE.values())


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_a_backbone_changes_something(pipelines, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    kind, value, where = OPTIONS[name]
    before, after = shows(pipelines, kind), shows(pipelines, kind, **{name: value})
    if where == "error": assert before["error"] is None and value in after["error"]
    else: assert before[where] != after[where]
    if where == "checkpointing": assert after[where] == [True, True]
    if where == "tiling": assert after[where] == [True, True]
    if where == "texts": assert after[where] == 3 # the empty prompt, the negative one, the one asked for


def test_a_whole_control_branch_is_one_of_the_ways_to_train(pipelines):
    "What is trained under each of the three: LoRA on the base, LoRA on the branch, the branch"
    names = {}
    for train in ("base", "control", "whole"):
        policy = backbone(pipelines, "sd", train=train)
        if train == "whole": policy.add_copy("controlnet")
        else: policy.add_lora(2)
        names[train] = [n for n, p in policy.net.named_parameters() if p.requires_grad]
    assert all(".unet." in n and "lora" in n for n in names["base"])
    assert all(".controlnet." in n and "lora" in n for n in names["control"])
    assert all(".controlnet." in n and "lora" not in n for n in names["whole"]) and len(names["whole"]) > 50

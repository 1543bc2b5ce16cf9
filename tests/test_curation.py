"Fixture 7: hierarchical weights have mean one, and no affine change of a raw metric moves rewards, pairs or weights"
import pytest
import torch

from srnb.core import check_close, generator
from srnb.curation import hpo_weights, inter_weight, intra_weight, top_bottom
from srnb.rewards import OFFLINE, GroupMinMax, hybrid


@pytest.mark.parametrize("m, n", [(2, 1), (8, 2), (9, 4), (64, 4)])
@pytest.mark.parametrize("intra, inter", [(False, False), (True, False), (False, True), (True, True)])
def test_mean_one(m, n, intra, inter):
    reward = torch.rand(7, m, generator=generator(m), dtype=torch.float64)
    w, k = top_bottom(reward, n)
    weight = hpo_weights(reward, w, k, intra, inter)
    check_close(weight.mean(), 1., atol=1e-12)
    check_close(intra_weight(reward.gather(1, w), reward.gather(1, k)).mean((1, 2)), torch.ones(7), atol=1e-12)
    check_close(inter_weight(reward).mean(), 1., atol=1e-12)
    if not (intra or inter): assert (weight == 1).all()
    if n == 1 and intra and not inter: check_close(weight, torch.ones(7, 1, 1), atol=1e-12)


def test_affine():
    g, raw = generator(1), {}
    for metric in OFFLINE.metrics: raw[metric.name] = torch.rand(6, 8, generator=g, dtype=torch.float64)
    changed = {name: 3.7*v - 11 for name, v in raw.items()}
    reward, other = (torch.stack([hybrid({n: v[i] for n, v in scores.items()}, OFFLINE, GroupMinMax()) for i in range(6)]) for scores in (raw, changed))
    check_close(reward, other, atol=1e-12)
    a, b = top_bottom(reward, 2), top_bottom(other, 2)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    check_close(hpo_weights(reward, *a), hpo_weights(other, *b), atol=1e-12)


def test_winner_is_better():
    "Orientation end to end: the winner of a group has the lower raw score of a metric that falls with quality"
    metric = OFFLINE.fr[0]
    assert not metric.higher_better
    raw = torch.tensor([[.5, .1, .9, .3]])
    reward = torch.stack([GroupMinMax()(raw[0], metric)])
    w, k = top_bottom(reward, 1)
    assert w.item() == 1 and k.item() == 2

"What the notebook of `srnb.metrics` cannot hold: large K, properties over many inputs, every bad input"
from itertools import combinations
from math import comb

import numpy as np
import pandas as pd
import pytest

from srnb import metrics as mt

RNG = np.random.default_rng(3)

def record(n=5, seeds=4, variants=("before", "after"), names=("reward", "lpips")):
    rows = [(f"p{i}", s, m, v, RNG.normal()) for i in range(n) for s in range(seeds) for m in names for v in variants]
    return pd.DataFrame(rows, columns=mt.COLUMNS)

# fixture 8 of methods.md
@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_every_m_against_all_subsets(k):
    r = RNG.normal(size=k)
    for m in range(1, k+1):
        subsets = [[r[i] for i in o] for o in combinations(range(k), m)]
        assert len(subsets) == comb(k, m)
        assert mt.best_at_m(r, m) == pytest.approx(np.mean([max(o) for o in subsets]), abs=1e-13)
        assert mt.worst_at_m(r, m) == pytest.approx(np.mean([min(o) for o in subsets]), abs=1e-13)
        assert mt.mean_at_m(r, m) == pytest.approx(np.mean([np.mean(o) for o in subsets]), abs=1e-13)
    assert mt.best_at_m(r, 1) == pytest.approx(mt.worst_at_m(r, 1)) == pytest.approx(mt.mean_at_m(r, 1))
    assert (mt.best_at_m(r, k), mt.worst_at_m(r, k)) == (r.max(), r.min())

def test_uniform_rewards_at_large_k():
    "The i-th of K uniform order statistics has mean i/(K+1): the estimator maps these to M/(M+1) for every K"
    for k in (64, 1000):
        r = np.arange(1, k+1)/(k+1)
        for m in (1, 3, 64):
            assert mt.best_at_m(r, m) == pytest.approx(m/(m+1), abs=1e-12)
            assert mt.worst_at_m(r, m) == pytest.approx(1/(m+1), abs=1e-12)

def test_curves_are_monotone_and_affine():
    r = RNG.normal(size=(20, 16))
    best = np.stack([mt.best_at_m(r, m) for m in range(1, 17)])
    worst = np.stack([mt.worst_at_m(r, m) for m in range(1, 17)])
    assert (np.diff(best, axis=0) > 0).all() and (np.diff(worst, axis=0) < 0).all()
    np.testing.assert_allclose(mt.best_at_m(3*r+2, 5), 3*best[4]+2, atol=1e-12)

def test_ties_and_integers():
    assert mt.best_at_m([1, 1, 1, 2], 2) == pytest.approx(1.5)
    assert mt.worst_at_m([1, 1, 1, 2], 2) == 1

def test_interval_by_hand():
    "Two photographs of means 1 and 3: t(.975, 1) = 12.7062, s/sqrt(n) = 1"
    i = mt.interval([0, 2, 3, 3, 3], ["a", "a", "b", "b", "b"])
    assert (i.mean, i.n) == (2, 2) and i.high-i.mean == pytest.approx(12.7062, abs=1e-4) == i.mean-i.low

def test_seeds_do_not_narrow_an_interval():
    v, images = RNG.normal(size=8), np.array([f"p{i}" for i in range(8)])
    once, tenfold = mt.interval(v, images), mt.interval(np.repeat(v, 10), np.repeat(images, 10))
    assert (once.low, once.high) == pytest.approx((tenfold.low, tenfold.high))

def test_differences_are_paired_by_seed_not_by_order():
    t = record()
    t.loc[t.variant == "after", "value"] = t[t.variant == "before"].value.to_numpy()+1
    d = mt.differences(t.sample(frac=1, random_state=1))
    np.testing.assert_allclose(d.value, 1)
    assert len(d) == 5*4*2 and set(d.variant) == {"after - before"}

def test_summary_table():
    t = record()
    s = mt.summarise(t)
    assert s.groupby("metric").variant.agg(list).tolist() == [["before", "after", "after - before"]]*2
    assert (s.photographs == 5).all() and (s.seeds == 4).all()
    assert (s.low < s["mean"]).all() and (s["mean"] < s.high).all()
    assert len(mt.summarise(t, after="nothing")) == 4
    row = mt.summarise(t[(t.metric == "lpips") & (t.variant == "after")], level=.5).iloc[0]
    full = s[(s.metric == "lpips") & (s.variant == "after")].iloc[0]
    assert row["mean"] == full["mean"] and row.high < full.high

def test_at_m_is_a_record_again():
    t = record()
    a = mt.at_m(t, [1, 2, 4])
    assert len(a) == 5*2*3*3 and list(a) == mt.COLUMNS
    one = t[(t.metric == "reward") & (t.image == "p3") & (t.variant == "after")].value
    got = a[(a.image == "p3") & (a.variant == "after")].set_index("metric").value
    assert (got["Best@4"], got["Worst@4"]) == (one.max(), one.min()) and got["Mean@2"] == pytest.approx(one.mean())
    mt.summarise(pd.concat([t, a]))

def study(*changes):
    "A record in which training k of two photographs changes by changes[k] and changes[k]+.2, in both of two seeds"
    rows = [dict(row="a", training=k, image=f"p{p}", seed=s, metric="reward", variant=v,
                 value=10*p+s+(v == "after")*(c+.2*p))
            for k, c in enumerate(changes) for p in range(2) for s in range(2) for v in ("before", "after")]
    return pd.DataFrame(rows)

def test_a_studys_change_by_hand():
    d = mt.study_change(study(-1., .3), "a", "reward").set_index(["image", "training"]).value
    want = {("p0", 0): -1., ("p0", 1): .3, ("p1", 0): -.8, ("p1", 1): .5} # after minus before
    assert d.to_dict() == pytest.approx(want)

@pytest.mark.parametrize("changes, seeds", [
    ((-1., -.5, .2), "2 of 3 agree"), # the mean is -1/3, and two trainings are below 0
    ((1., .5, -.4), "2 of 3 agree"),
    ((-1., -.5, -.4), "3 of 3 agree"),
    ((-3., .5, .4), "1 of 3 agree"), # one training has made the mean what it is
    ((3., -.5, -.4), "1 of 3 agree"),
])
def test_how_many_trainings_agree_with_the_sign_of_the_mean(changes, seeds):
    d = mt.study_change(study(*changes), "a", "reward")
    told = mt.claim("it rises", "a", d, digits=2)
    assert (told["sentence"], told["row"], told["seeds"]) == ("it rises", "a", seeds)
    mean, low = np.mean(changes)+.1, np.mean(changes)+.1-12.7062*.1 # photographs .2 apart: t(.975, 1) s/sqrt(2)
    assert told["value"] == f"{mean:+.2f} [{low:+.2f}, {2*mean-low:+.2f}] ± {np.std(changes, ddof=1):.2f}"
    assert told["interval"] == ("above 0" if low > 0 else "below 0" if 2*mean-low < 0 else "includes 0")

@pytest.mark.parametrize("low, high, word", [
    (.1, 2, "above 0"), (-2, -.1, "below 0"), (-1, 1, "includes 0"), (0, 1, "includes 0"), (-1, 0, "includes 0")])
def test_verdict(low, high, word): assert mt.verdict(mt.Interval((low+high)/2, low, high, 2)) == word

def test_spread_and_mean_std():
    s = mt.spread([1., 2., 4.])
    assert (s.mean, s.std, s.low, s.high, s.n) == pytest.approx((7/3, np.std([1, 2, 4], ddof=1), 1, 4, 3))
    assert mt.mean_std([0, 2, 10, 14], list("aabb")) == pytest.approx((6.5, (2**.5+8**.5)/2))

@pytest.mark.parametrize("call,text", [
    (lambda: mt.best_at_m([1., np.nan], 1), "rewards must be finite, 1 of 2"),
    (lambda: mt.worst_at_m([1., np.inf], 1), "rewards must be finite, 1 of 2"),
    (lambda: mt.best_at_m([1., 2.], 3), "m must lie in"),
    (lambda: mt.best_at_m([1., 2.], 0), "m must lie in"),
    (lambda: mt.mean_at_m([], 1), "K >= 1"),
    (lambda: mt.interval([1., 2.], ["a", "a"]), "at least 2, got 1"),
    (lambda: mt.interval([1., np.nan], ["a", "b"]), "first of photograph b"),
    (lambda: mt.interval([1., 2.], ["a", None]), "needs a photograph"),
    (lambda: mt.interval([1., 2.], ["a"]), "one length"),
    (lambda: mt.interval([1., 2.], ["a", "b"], level=95), "level must lie"),
    (lambda: mt.spread([1.]), "at least 2"),
    (lambda: mt.spread([1., np.nan]), "must be finite"),
    (lambda: mt.mean_std([1., 2., 3.], ["a", "a", "b"]), "b has 1"),
    (lambda: mt.summarise(record().drop(columns="seed")), "missing"),
    (lambda: mt.summarise(record().iloc[:0]), "empty"),
    (lambda: mt.summarise(record().assign(value=np.nan)), "not finite"),
    (lambda: mt.summarise(record().assign(image=None)), "incomplete"),
    (lambda: mt.summarise(record().iloc[1:]), "no partner"),
    (lambda: mt.summarise(record(n=1)), "seeds are not photographs"),
    (lambda: mt.check_table(pd.concat([record(), record()])), "a duplicate"),
    (lambda: mt.differences(record(), after="later"), "the variants are"),
    (lambda: mt.at_m(record(), [8]), "needs as many seeds"),
    (lambda: mt.at_m(record(), [1], metric="psnr"), "the record has"),
])
def test_bad_input(call, text):
    with pytest.raises(ValueError, match=text): call()

"Beside the notebook of `srnb.look`: well-formed pages, what they must not name, every bad input, reading back"
import hashlib
import json
import re
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from srnb import look as lk
from srnb.core import generator, to_pil, write_image
from srnb.metrics import interval

VOID = {"meta", "link", "img", "input", "br"}
METHODS = ("method-one", "method-two", "method-three")

def picture(seed, h=16, w=24): return torch.rand(3, h, w, generator=generator(seed))

class Tags(HTMLParser):
    "Open and close tags in order, with all attributes"
    def __init__(self, text):
        super().__init__()
        self.stack, self.seen, self.problems = [], [], []
        self.feed(text)
        self.close()
    def handle_starttag(self, tag, attrs):
        names = [k for k, _ in attrs]
        if len({*names}) < len(names): self.problems.append(f"{tag}: an attribute twice")
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID: self.stack.append(tag)
    def handle_endtag(self, tag):
        if tag in VOID or not self.stack or self.stack.pop() != tag: self.problems.append(f"</{tag}>")

def parsed(text):
    p = Tags(text)
    assert p.problems == [] and p.stack == []
    return p.seen

def ids(seen): return [a["id"] for _, a in seen if "id" in a]
def shown(uri): return np.asarray(Image.open(BytesIO(b64decode(uri.partition(",")[2]))))


# ---- slider

def test_slider_is_well_formed_and_scoped():
    text = lk.slider(picture(0), picture(1), "A < B & \"C\"\n\n</script>", ("be'fore", "<after>"), "by <me>")
    seen = parsed(text)
    assert text.startswith("<figure") and not re.search(r"\n\s*\n", text)
    assert "http" not in text and "@import" not in text and "url(" not in text
    (name,) = ids(seen)
    rules = re.sub(r"@media \w+ \{", "", re.search(r"<style>(.*?)</style>", text, re.S)[1])
    for selectors in re.findall(r"([^{}]+)\{", rules):
        assert all(o.strip().startswith(f"#{name}") for o in selectors.split(","))
    pictures = [a for t, a in seen if t == "img"]
    assert [a["alt"] for a in pictures] == ["be'fore: A < B & \"C\" </script>", "<after>: A < B & \"C\" </script>"]
    assert text.count("<script>") == text.count("</script>") == 1
    (handle,) = [a for t, a in seen if t == "input"]
    assert handle["type"] == "range" and "be'fore" in handle["aria-label"]
    assert (handle["min"], handle["max"]) == ("0", "100")

def test_slider_order_and_content():
    a, b = torch.zeros(3, 8, 8), torch.ones(3, 8, 8)
    seen = parsed(lk.slider(a, b, "x"))
    assert [shown(o["src"]).mean() for t, o in seen if t == "img"] == [0, 255] # before, after

def test_slider_is_deterministic_and_ids_tell_contents_apart():
    a, b = picture(0), picture(1)
    one = lk.slider(a, b, "x")
    assert one == lk.slider(a.clone(), b.clone(), "x")
    others = [lk.slider(b, a, "x"), lk.slider(a, b, "y"), lk.slider(a, b, "x", ("c", "d"))]
    others.append(lk.slider(a, b, "x", width=99))
    assert len({ids(parsed(o))[0] for o in (one, *others)}) == 5

def test_slider_fits_its_limit_or_refuses():
    a, b = picture(0, 96, 96), picture(1, 96, 96)
    whole = lk.slider(a, b, "x")
    small = lk.slider(a, b, "x", limit=len(whole)-1)
    assert len(small) < len(whole) <= 100_000
    with pytest.raises(ValueError, match="limit 5 kB; crop the pictures"): lk.slider(a, b, "x", limit=5000)

@pytest.mark.parametrize("change, error, message", [
    (dict(before=picture(0, 8, 8)), ValueError, "one size"), (dict(alt=" "), ValueError, "alt text"),
    (dict(labels=("a",)), ValueError, "two labels"), (dict(labels=("a", "")), ValueError, "two labels"),
    (dict(after=picture(0)*2), ValueError, r"after must lie in \[0, 1\]"),
    (dict(after=picture(0).double()), TypeError, "float32")])
def test_slider_refuses(change, error, message):
    with pytest.raises(error, match=message): lk.slider(**dict(before=picture(0), after=picture(1), alt="x") | change)


# ---- files of the package

def digest(text): return hashlib.sha256(text.encode()).hexdigest()

def test_text_style_and_script_are_what_they_were(outputs, tmp_path):
    "Digests of what surrounds pictures and study, taken when all of it stood inside the module"
    text = lk.slider(picture(0), picture(1), "A < B", ("be'fore", "<after>"), "by <me>")
    (name,) = ids(parsed(text))
    text = re.sub(r'data:image[^"]*', "data:", text.replace(name, "ID"))
    assert digest(text) == "d532330c834a57117b1c16e93e62865d4c893957710f49a0bca6e3aa31a28513"
    page = lk.write_ranking(outputs, tmp_path/"s.html")[0].read_text()
    study = r'(<script type="application/json" id="study">).*?(</script>)'
    page = re.sub(study, r"\1\2", page, flags=re.S)
    assert digest(page) == "835f9552333e576ac282f2b6f91ccc3347ba66d3068cdf8eb2a7f09dab9b8f30"


# ---- ranking page

@pytest.fixture
def outputs(tmp_path):
    "Folders of three methods and of the inputs, three images each"
    for k, m in enumerate(METHODS):
        for i in range(3): write_image(tmp_path/m/f"photo-{i}.png", picture(10*k+i))
    for i in range(3): write_image(tmp_path/"inputs"/f"photo-{i}.png", picture(50+i, 4, 6))
    return {m: tmp_path/m for m in METHODS}

def study_of(page): # the content that the page's script reads
    found = re.search(r'<script type="application/json" id="study">(.*?)</script>', page.read_text(), re.S)
    return json.loads(found[1])

def answered(key, path, who, orders=None, **other):
    orders = orders or {i: list(o["methods"])[:key["places"]] for i, o in key["images"].items()}
    path.write_text(json.dumps(dict(study=key["study"], participant=who, answers=orders) | other))
    return path

def test_page_is_well_formed_and_self_contained(outputs, tmp_path):
    page, key = lk.write_ranking(outputs, tmp_path/"s.html", tmp_path/"inputs", question="Which </script> & why?")
    text = page.read_text()
    seen = parsed(text)
    assert "http" not in text and "@import" not in text and "url(" not in text
    assert all((a.get("src") or a.get("href") or "data:").startswith("data:") for _, a in seen)
    named = ids(seen)
    assert len(named) == len({*named}) and {*re.findall(r'\bat\("(\w+)"\)', text)} <= {*named}
    assert study_of(page)["question"] == "Which </script> & why?"
    assert key == tmp_path/"s.key.json" and len(text.split("<script>")[1].splitlines()) < 150

def test_page_names_nothing(outputs, tmp_path):
    info = PngInfo()
    info.add_text("model", "method-one")
    to_pil(picture(0)).save(tmp_path/"method-one/photo-0.png", pnginfo=info)
    page, key = lk.write_ranking(outputs, tmp_path/"s.html", tmp_path/"inputs", seed=8675309)
    text = page.read_text()
    for o in (*METHODS, "photo-", "8675309", str(tmp_path)): assert o not in text
    for image in study_of(page)["images"]:
        assert {*image} == {"pictures", "reference"}
        for uri in image["pictures"]: assert b"method" not in b64decode(uri.partition(",")[2])
    assert {o["image"] for o in lk.read_key(key)["images"].values()} == {f"photo-{i}" for i in range(3)}

def test_key_matches_the_pictures(outputs, tmp_path):
    page, key = lk.write_ranking(outputs, tmp_path/"s.html", tmp_path/"inputs", seed=1)
    study, key = study_of(page), lk.read_key(key)
    assert study["study"] == key["study"] and study["places"] == key["places"] == 3
    for i, image in enumerate(study["images"], 1):
        name, methods = key["images"][str(i)]["image"], key["images"][str(i)]["methods"]
        assert list(methods) == list("ABC") and {*methods.values()} == {*METHODS}
        files = [outputs[m]/f"{name}.png" for m in methods.values()] + [tmp_path/f"inputs/{name}.png"]
        for uri, file in zip([*image["pictures"], image["reference"]], files, strict=True):
            assert uri.startswith("data:image/png")
            assert (shown(uri) == np.asarray(Image.open(file))).all()

def test_page_is_deterministic_and_seeds_differ(outputs, tmp_path):
    a = lk.write_ranking(outputs, tmp_path/"a.html", seed=1)
    turned = dict(reversed(outputs.items()))
    b = lk.write_ranking(turned, tmp_path/"b.html", seed=1)
    assert [o.read_bytes() for o in a] == [o.read_bytes() for o in b]
    assert [o.read_bytes() for o in lk.write_ranking(outputs, tmp_path/"a.html", seed=1)] == [o.read_bytes() for o in a]
    keys = [lk.read_key(lk.write_ranking(outputs, tmp_path/f"{s}.html", seed=s)[1]) for s in range(8)]
    assert len({json.dumps(k["images"]) for k in keys}) > 4 and len({k["study"] for k in keys}) > 4
    assert len({tuple(o["methods"].values()) for k in keys for o in k["images"].values()}) > 4

def test_places_question_and_quality_change_the_study(outputs, tmp_path):
    changes = (dict(), dict(top=2), dict(question="Which?"), dict(quality=90), dict(reference=tmp_path/"inputs"))
    studies = [lk.read_key(lk.write_ranking(outputs, tmp_path/f"{i}.html", **o)[1])["study"]
               for i, o in enumerate(changes)]
    assert len({*studies}) == 5
    assert "image/jpeg" in (tmp_path/"3.html").read_text() and "image/jpeg" not in (tmp_path/"0.html").read_text()

def test_folders_may_use_other_endings(outputs, tmp_path):
    old = tmp_path/"method-one/photo-0.png"
    Image.open(old).save(old.with_suffix(".webp"), lossless=True)
    old.unlink()
    assert len(study_of(lk.write_ranking(outputs, tmp_path/"s.html")[0])["images"]) == 3

def test_missing_outputs_are_listed(outputs, tmp_path):
    (tmp_path/"method-one/photo-1.png").unlink()
    (tmp_path/"method-two/photo-2.png").unlink()
    with pytest.raises(ValueError, match="method-one lacks 1: photo-1; method-two lacks 1: photo-2"):
        lk.write_ranking(outputs, tmp_path/"s.html")
    assert not list(tmp_path.glob("s.*"))

@pytest.mark.parametrize("change, message", [
    (dict(out="s.htm"), "written as .html"), (dict(top=4), r"top must lie in \[1, 3\]"),
    (dict(top=-1), r"top must lie"), (dict(folders=1), "2 to 26 methods, got 1"),
    (dict(limit=1000), "0.0 MB; give quality=95"), (dict(reference="method-odd"), "lacks 2 inputs: photo-1, photo-2")])
def test_ranking_refuses(change, message, outputs, tmp_path):
    write_image(tmp_path/"method-odd/photo-0.png", picture(0))
    asked = dict(folders=outputs, out=tmp_path/"s.html") | change
    for name in ("reference", "out"):
        if name in change: asked[name] = tmp_path/change[name]
    if "folders" in change: asked["folders"] = dict(list(outputs.items())[:change["folders"]])
    with pytest.raises(ValueError, match=message): lk.write_ranking(**asked)
    assert not list(tmp_path.glob("s.*"))

def test_unequal_sizes_and_a_second_study_are_refused(outputs, tmp_path):
    lk.write_ranking(outputs, tmp_path/"s.html")
    before = (tmp_path/"s.key.json").read_bytes()
    with pytest.raises(ValueError, match="another study"):
        lk.write_ranking(outputs, tmp_path/"s.html", question="Other?")
    write_image(tmp_path/"method-two/photo-1.png", picture(0, 8, 8))
    with pytest.raises(ValueError, match="photo-1 have unequal sizes.*method-two 8×8"):
        lk.write_ranking(outputs, tmp_path/"t.html")
    assert (tmp_path/"s.key.json").read_bytes() == before and not (tmp_path/"t.html").exists()


# ---- answers

def test_answers_are_read_back(outputs, tmp_path):
    _, file = lk.write_ranking(outputs, tmp_path/"s.html", seed=5)
    key = lk.read_key(file)
    letters = {i: {m: c for c, m in o["methods"].items()} for i, o in key["images"].items()}
    worst_first = {i: [letter[m] for m in METHODS[::-1]] for i, letter in letters.items()}
    files = [answered(key, tmp_path/"1.json", "p"), answered(key, tmp_path/"2.json", " q ", worst_first)]
    t = lk.read_answers(files, file)
    assert list(t) == ["participant", "image", "method", "rank"] and len(t) == 2*3*3 and {*t.participant} == {"p", "q"}
    for _, row in t[t.participant == "p"].iterrows():
        letters = next(o["methods"] for o in key["images"].values() if o["image"] == row.image)
        assert "ABC".index(next(c for c, m in letters.items() if m == row.method))+1 == row["rank"]
    ranks = t[t.participant == "q"].groupby("method")["rank"].unique().map(list).to_dict()
    assert ranks == dict(zip(METHODS, ([3], [2], [1]), strict=True))
    assert lk.read_answers(str(files[0]), str(file)).equals(t[t.participant == "p"].reset_index(drop=True))
    assert lk.check_answers(t).equals(t)

def test_places_that_were_not_given(outputs, tmp_path):
    _, file = lk.write_ranking(outputs, tmp_path/"s.html", top=1)
    key = lk.read_key(file)
    t = lk.read_answers(answered(key, tmp_path/"1.json", "p"), file)
    assert (t["rank"] == 1).sum() == 3 and t["rank"].isna().sum() == 6
    votes = lk.top_votes(t, "image")
    assert votes.votes.sum() == 3 and votes.share.sum() == pytest.approx(1)
    with pytest.raises(ValueError, match=r"k must lie in \[1, 1\]"): lk.top_k_ratio(t, 2)

ABC = ["A", "B", "C"]
def bad_order(order): return lambda key: dict(answers={i: order if i == "2" else ABC for i in key["images"]})
def named(participant): return lambda key: dict(participant=participant)
@pytest.mark.parametrize("other, message", [
    (lambda k: dict(study="0"*16), "answers of study 0000000000000000"), (named(" "), "no participant"),
    (lambda k: dict(answers={}), "incomplete, 3 of 3 images"), (lambda k: dict(answers=[1]), "not the answers"),
    (lambda k: dict(answers={**{i: ABC for i in k["images"]}, "9": ABC}), "image 9 is not in the study"),
    (bad_order(["A", "B"]), "image 2: incomplete, 2 of 3"), (bad_order(["A", "B", "B"]), "image 2: .*a duplicate"),
    (bad_order(["A", "B", "Z"]), "letters of A, B, C"), (bad_order("ABC"), "letters of A, B, C"),
    (bad_order(["A", "B", None]), "letters of"), (bad_order(["A", ["B"], "C"]), "letters of A, B, C"),
    (bad_order(["A", {"B": 1}, "C"]), "image 2: .*letters of"), (bad_order([1, "B", "C"]), "letters of"),
    (named(None), "no participant, .*None"), (named(["p"]), "no participant"), (named(7), "no participant, .*7")])
def test_bad_answers_are_named(other, message, outputs, tmp_path):
    _, file = lk.write_ranking(outputs, tmp_path/"s.html")
    key = lk.read_key(file)
    path = answered(key, tmp_path/"bad.json", "p", **other(key))
    with pytest.raises(ValueError, match=message) as e: lk.read_answers([path], file)
    assert "bad.json" in str(e.value)

@pytest.mark.parametrize("text, message", [("{\"study\": ", "damaged JSON"), ("", "damaged JSON"),
                                           ("[1]", "not the answers"), ("{}", "not the answers")])
def test_damaged_files(text, message, outputs, tmp_path):
    _, file = lk.write_ranking(outputs, tmp_path/"s.html")
    (tmp_path/"a.json").write_text(text)
    with pytest.raises(ValueError, match=message): lk.read_answers(tmp_path/"a.json", file)
    with pytest.raises(ValueError, match="damaged JSON|not the key"): lk.read_key(tmp_path/"a.json")
    with pytest.raises(ValueError, match="no files"): lk.read_answers([], file)

def test_a_byte_order_mark_is_read_over(outputs, tmp_path):
    _, file = lk.write_ranking(outputs, tmp_path/"s.html")
    path = answered(lk.read_key(file), tmp_path/"1.json", "Zoë")
    plain = lk.read_answers(path, file)
    for o in (path, file): o.write_text(o.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert path.read_bytes()[:3] == file.read_bytes()[:3] == b"\xef\xbb\xbf"
    assert lk.read_answers(path, file).equals(plain)

def test_a_participant_counts_once(outputs, tmp_path):
    _, file = lk.write_ranking(outputs, tmp_path/"s.html")
    files = [answered(lk.read_key(file), tmp_path/f"{i}.json", "p") for i in range(2)]
    with pytest.raises(ValueError, match="1.json and .*0.json are both of participant 'p'"):
        lk.read_answers(files, file)


# ---- statistics

def table(orders): # {(participant, image): "abc"}
    return pd.DataFrame([(p, i, m, float(r)) for (p, i), o in orders.items() for r, m in enumerate(o, 1)],
                        columns=["participant", "image", "method", "rank"])

HAND = {("p", "x"): "abc", ("p", "y"): "bac", ("p", "z"): "acb",
        ("q", "x"): "abc", ("q", "y"): "cab", ("q", "z"): "bca"}

def test_ratio_and_interval_by_hand():
    t = table(HAND)
    # a is first in px, pz, qx: 3 of 6; means over participants of x, y, z: 1, 0, 1/2; sd 1/2, t(.975, 2) = 4.30265
    a = lk.top_votes(t, "image").set_index("method").loc["a"]
    assert (a.votes, a.share) == (3, .5) and (a.low, a.high) == (0, 1) # .5 ± 1.24
    i = interval([1., 0, .5], list("xyz"), .5) # t(.75, 2) = .816497: .5 ± .2357
    a = lk.top_votes(t, "image", .5).set_index("method").loc["a"]
    assert (a.low, a.high) == pytest.approx((.5-.816497*.5/3**.5, .5+.816497*.5/3**.5), abs=1e-5)
    assert (a.low, a.high) == pytest.approx((i.low, i.high))
    # a is second in py, qy: with k = 2 a has 5 of 6, b 4 (px, py, qx, qz), c 3 (pz, qy, qz)
    two = lk.top_k_ratio(t, 2).set_index("method")
    assert two.votes.to_dict() == dict(a=5, b=4, c=3) and two.ratio.sum() == pytest.approx(2)
    # over participants: p puts a first in 2 of 3, q in 1 of 3
    half = lk.top_votes(t, "participant", level=.5).set_index("method").loc["a"]
    assert (half.low, half.high) == pytest.approx((1/3, 2/3)) # sd .2357, t(.75, 1) = 1: .5 ± .1667

def test_order_of_rows_and_sums():
    def drawn(*key): return "".join(np.random.default_rng(key).permutation(list("abcd")))
    t = table({(p, i): drawn(p, i) for p in range(5) for i in range(7)})
    mixed = t.sample(frac=1, random_state=0)
    for k in range(1, 5):
        found = lk.top_k_ratio(t, k)
        assert lk.top_k_ratio(mixed, k).equals(found) and found.ratio.sum() == pytest.approx(k)
    assert lk.top_votes(t).share.is_monotonic_decreasing
    assert (lk.top_k_ratio(t, 4)[["ratio", "low", "high"]] == 1).all(axis=None)
    wide = lk.top_votes(t, level=.99).set_index("method")
    narrow = lk.top_votes(t, level=.8).set_index("method")
    assert ((wide.low <= narrow.low) & (narrow.low <= narrow.share) & (narrow.high <= wide.high)).all()

@pytest.mark.parametrize("change, message", [
    (lambda t: t.drop(columns="rank"), "are missing"), (lambda t: t[:0], "empty"),
    (lambda t: t.assign(method=None), "lacks its participant"), (lambda t: pd.concat([t, t[:1]]), "a duplicate"),
    (lambda t: t[1:], "need the ranks"), (lambda t: t.assign(**{"rank": 1.}), "need the ranks"),
    (lambda t: t.assign(**{"rank": t["rank"].where(t["rank"] < 3, 4.)}), "need the ranks"),
    (lambda t: t[3:], "not every participant")])
def test_bad_tables(change, message):
    with pytest.raises(ValueError, match=message): lk.top_votes(change(table(HAND)))

def test_one_image_gives_no_interval():
    t = table({("p", "x"): "ab", ("q", "x"): "ba"})
    way = '2 of each, got 1 image; unit="participant" takes it over the 2 participants alone'
    with pytest.raises(ValueError, match=way): lk.top_votes(t)
    with pytest.raises(ValueError, match="at least 2 of each, got 1 image$"): lk.top_votes(t, "image")
    assert lk.top_votes(t, "participant").share.tolist() == [.5, .5]

def test_one_participant_gives_an_interval_over_images_only():
    t = table({("p", "x"): "ab", ("p", "y"): "ba", ("p", "z"): "ab"})
    way = 'got 1 participant; unit="image" takes it over the 3 images alone'
    for o in (dict(), dict(unit="both")):
        with pytest.raises(ValueError, match=way): lk.top_votes(t, **o)
    assert lk.top_votes(t, "image").low.notna().all()
    with pytest.raises(ValueError, match="got 1 participant$"): lk.top_votes(t, "participant")
    with pytest.raises(ValueError, match="got 1 image$"): lk.top_votes(t[:2]) # one of each: no way out

@pytest.mark.parametrize("change, message", [
    (dict(unit="method"), "unit must be .*'method'"), (dict(unit=""), "unit must be"),
    (dict(level=1.), r"level must lie in \(0, 1\), got 1.0"), (dict(level=0.), "level must lie")])
def test_interval_refuses(change, message):
    with pytest.raises(ValueError, match=message): lk.top_votes(table(HAND), **change)

def test_both_is_the_default_and_by_hand():
    t = table(HAND)
    assert lk.top_votes(t).equals(lk.top_votes(t, "both")) and lk.top_k_ratio(t, 2).equals(lk.top_k_ratio(t, 2, "both"))
    # a first, images x, y, z by participants p, q: 11, 00, 10
    # V_image = (1/4)/3 = 1/12, V_participant = (1/18)/2 = 1/36
    # residuals: +-(1/6, 1/6, -1/3), squares 1/3 in all, over 2*1*6: V_residual = 1/36, so V = 1/12; t(.75, 1) = 1
    a = lk.top_votes(t, level=.5).set_index("method").loc["a"]
    assert (a.low, a.high) == pytest.approx((.5-12**-.5, .5+12**-.5))

def crossed(hits): # (images,participants), method a is first where 1, else b
    return table({(p, i): "ab" if h else "ba" for i, row in enumerate(hits) for p, h in enumerate(row)})
def half(hits, unit, level=.5):
    o = lk.top_votes(crossed(hits), unit, level).set_index("method").loc["a"]
    return o.high-o["share"]

def test_both_against_mean_squares():
    from scipy.stats import t
    noise = np.random.default_rng(3).normal(size=(9, 6))
    hits = (noise + np.linspace(-1, 1, 9)[:, None] + np.linspace(-1, 1, 6) > 0).astype(float)
    rows, columns = 6*hits.mean(1).var(ddof=1), 9*hits.mean(0).var(ddof=1) # mean squares of a two-way table
    rest = (hits.var()*54-8*rows-5*columns)/40
    assert rows > rest and columns > rest
    assert half(hits, "both") == pytest.approx(t.ppf(.75, 5)*((rows+columns-rest)/54)**.5)
    for unit, square, df in (("image", rows, 8), ("participant", columns, 5)):
        assert half(hits, unit) == pytest.approx(t.ppf(.75, df)*(square/54)**.5)

def test_both_is_never_less_than_one_way():
    from scipy.stats import t
    hits = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 1.]]) # 1/81 + 1/81 - 4/81 is negative
    var = hits.mean(1).var(ddof=1)/3
    assert half(hits, "both", .2) == pytest.approx(t.ppf(.6, 2)*var**.5)
    assert half(hits, "image", .2) == pytest.approx(half(hits, "both", .2))

@pytest.mark.parametrize("unit", ["both", "image", "participant"])
def test_units_that_agree_leave_the_interval_open(unit):
    t = table({(p, i): "abc" for p in "pqr" for i in "xyz"})
    one = lk.top_votes(t, unit)
    assert one.share.tolist() == [1, 0, 0] and one.votes.tolist() == [9, 0, 0]
    assert one[["low", "high"]].isna().all(axis=None)
    assert lk.top_k_ratio(t, 2, unit)[["low", "high"]].isna().all(axis=None)
    assert (lk.top_k_ratio(t, 3, unit)[["ratio", "low", "high"]] == 1).all(axis=None) # by definition
    thirds = table({(p, i): "abc"[(p+i) % 3:]+"abc"[:(p+i) % 3] for p in range(3) for i in range(3)}) # each mean is 1/3
    assert lk.top_votes(thirds, unit)[["low", "high"]].isna().all(axis=None)

def test_one_that_agrees_is_enough_for_no_gap():
    hits = np.repeat([[1], [0], [1], [1.]], 3, 1) # participants agree, images do not
    assert half(hits, "participant") != half(hits, "participant") and half(hits, "both") > half(hits, "image") > 0

def test_coverage_of_crossed_effects():
    from scipy.stats import t
    rng, covers = np.random.default_rng(7), dict(image=0, participant=0, both=0)
    for _ in range(400):
        x = (rng.normal(size=(30, 1)) + rng.normal(size=(1, 24)) + rng.normal(size=(30, 24)) > 0).astype(float)
        for unit in covers:
            var, df = lk._crossed(x, unit)
            covers[unit] += abs(x.mean()-.5) <= t.ppf(.975, df)*var**.5
    assert covers["both"] > 400*(.95-4*(.05*.95/400)**.5) and max(covers["image"], covers["participant"]) < 360

"Judges of text, objects, class maps and faces: by hand, in the right order of arguments, by name, and when missing"
import os
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from torchvision.models import get_model

import srnb.downstream as d
from srnb.config import record, revive
from srnb.core import generator
from srnb.data import embedded_photos
from srnb.degrade import RESSHIFT_TEST
from srnb.downstream import (FACE, LINE, OCR, OCR_LINE, PAGE, Judge, Objects, Text, above, agreement, box_ap, coco_ap,
                             confusion, cosine, detector, edit_distance, judged, labelled, mask_ap, mean_iou,
                             pixel_accuracy, places, predictor, segmenter, text_accuracy, text_recall,
                             torchvision_model)
from srnb.judge import compare_upscalers
from srnb.rewards import MetricUnavailable, check_available, score, scorer_of
from srnb.runs import Judging

g = generator(0)
PHOTO = torch.rand((3, 32, 48), generator=g).mul(255).round()/255
OUTPUT = (PHOTO*.5).mul(255).round()/255


# ---------------------------------------------------------------- the interface

def excess(found, truth): # not symmetric: only what was found too little counts
    return 1-sum(max(0., t-f) for f, t in zip(found, truth, strict=True))/len(truth)

MEAN = Judge("mean", lambda: lambda image: image.mean().item(), excess)


def test_what_was_found_comes_first():
    gap = (PHOTO.mean()-OUTPUT.mean()).item()
    assert score(agreement(MEAN), torch.stack([OUTPUT, PHOTO]), PHOTO).tolist() == pytest.approx([1-gap, 1])
    assert score(agreement(MEAN), PHOTO[None], OUTPUT).tolist() == [1]
    assert judged(MEAN, [OUTPUT, PHOTO], [PHOTO, OUTPUT]) == pytest.approx(1-gap/2)


def test_labels_stand_for_the_truth():
    metric = labelled(MEAN, [PHOTO, OUTPUT], [.9, .1])
    assert metric.name == "mean_labels" != agreement(MEAN).name and metric.kind == "fr"
    assert score(metric, OUTPUT[None], PHOTO).item() == pytest.approx(1-.9+OUTPUT.mean().item())
    assert score(metric, PHOTO[None], OUTPUT).item() == 1
    assert judged(MEAN, [OUTPUT], labels=[.9]) == pytest.approx(1-.9+OUTPUT.mean().item())
    with pytest.raises(ValueError, match="mean has no label for a ground truth"): score(metric, PHOTO[None], 1-PHOTO)
    check_available([labelled(MEAN, [PHOTO], [.9], other=.5)], (16, 16))
    with pytest.raises(ValueError, match="1 labels for 2 pictures"): labelled(MEAN, [PHOTO, OUTPUT], [.9])
    with pytest.raises(ValueError, match="two labels for the same"): labelled(MEAN, [PHOTO, PHOTO], [.9, .8])


def test_the_truth_is_read_once_and_never_that_of_another_picture():
    calls = []
    def load(): return lambda image: calls.append(1) or image.mean().item()
    metric = agreement(replace(MEAN, load=load))
    for gt in (PHOTO, PHOTO, OUTPUT, PHOTO):
        assert score(metric, torch.stack([OUTPUT, PHOTO]), gt).tolist() == pytest.approx(
            [excess([OUTPUT.mean().item()], [gt.mean().item()]), 1])
    assert len(calls) == 4*2+3


def test_judges_have_names_in_configs():
    said = dict(reward=None, judges=["psnr_y", "ocr_ppocrv6", "ap_mask_maskrcnn_v2", "miou_deeplabv3_voc", "face_dlib"])
    run = revive(Judging, said)
    assert run.judges[1] is OCR and record(run)["judges"] == said["judges"]
    with pytest.raises(ValueError, match="did you mean 'ocr_line_ppocrv6'"):
        revive(Judging, dict(reward=None, judges=["ocr_line_ppocrv5"]))


def test_a_comparison_takes_judges(tmp_path):
    photo = embedded_photos("held_out")[:1]
    models = dict(nearest=lambda lq: torch.nn.functional.interpolate(lq, scale_factor=4))
    table = compare_upscalers(tmp_path, models, photo, RESSHIFT_TEST, [agreement(MEAN)], 64)
    assert .8 < table[table.metric == "mean"].value.item() <= 1


@pytest.mark.parametrize("module, metric, extra", [
    ("rapidocr", OCR, "text"), ("onnxruntime", OCR_LINE, "text"), ("dlib", d.FACE_IDENTITY, "faces")])
def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch, module, metric, extra):
    monkeypatch.setitem(sys.modules, module, None)
    d._rapidocr.cache_clear()
    scorer_of.cache_clear()
    with pytest.raises(MetricUnavailable, match=rf"^cannot import {module} .*run pip install 'srnb\[{extra}\]'$"):
        check_available([metric])


def test_pycocotools_is_named_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    with pytest.raises(MetricUnavailable, match=r"run pip install 'srnb\[detect\]'"): box_ap([TWO], [TWO])


def test_weights_that_are_elsewhere_are_not_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for metric, file in ((d.BOX_AP, "fasterrcnn_resnet50_fpn_v2_coco"), (d.MIOU_VOC, "deeplabv3_resnet50_coco")):
        with pytest.raises(MetricUnavailable, match=f"needs weights at .*{file}.*download .* once"):
            check_available([metric])
    with pytest.raises(MetricUnavailable, match="no files of nvidia/segformer.*in the Hugging Face cache"):
        check_available([d.MIOU_ADE])


# ---------------------------------------------------------------- text

def test_edit_distance_by_recursion():
    def slow(a, b):
        if not a or not b: return len(a)+len(b)
        return min(slow(a[:-1], b)+1, slow(a, b[:-1])+1, slow(a[:-1], b[:-1])+(a[-1] != b[-1]))
    rng = np.random.default_rng(0)
    for _ in range(60):
        a, b = ("".join(rng.choice(list("abc"), rng.integers(6))) for _ in range(2))
        assert edit_distance(a, b) == slow(a, b), (a, b)


@pytest.mark.parametrize("found, truth, want", [
    ("ABC d", "ab cd", 1), ("ﬁne", "fine", 1), ("abx", "abcd", .5), ("abcd", "ab", 0), ("a", "abcd", .25), ("", "", 1),
    ("x", "", 0), ("", "x", 0), ("invented", "sign", 0)])
def test_character_accuracy(found, truth, want): # of the truth's length, and not of the other's
    assert text_accuracy([Text((found,))], [Text((truth,))]) == want


def test_characters_are_pooled():
    found, truth = [Text(("abcdefgh",)), Text(("x",))], [Text(("abcdefgh",)), Text(("yz",))]
    assert text_accuracy(found, truth) == .8
    with pytest.raises(ValueError, match="answers for 1 pictures, truths for 2"): text_accuracy(found[:1], truth)


def test_lines_meet_by_place():
    boxes = torch.tensor([[0., 0, 10, 4], [20, 0, 30, 4], [0, 10, 10, 14]])
    truth = Text(("one", "two", "three"), boxes)
    def accuracy(lines, where): return text_accuracy([Text(lines, where)], [truth])
    assert accuracy(("three", "one", "two"), boxes[[2, 0, 1]]) == 1
    assert accuracy(("three", "one", "two"), boxes) == 0
    assert accuracy(("one", "two"), boxes[:2]) == pytest.approx(6/11)
    assert accuracy(("one", "two", "three", "four"), torch.cat([boxes, boxes[:1]+50])) == pytest.approx(7/11)
    cut = torch.cat([boxes[:1]-torch.tensor([0., 0, 6, 0]), boxes[:1]+torch.tensor([5., 0, 0, 0]), boxes[1:]])
    pieces = Text(("o", "ne", "two", "three"), cut) # a line that is seen as two
    assert text_accuracy([pieces], [truth]) == text_accuracy([truth], [pieces]) == 1
    assert text_recall([pieces], [truth]) == text_recall([truth], [pieces]) == 1
    point = torch.tensor([[5., 2, 5, 2]]) # of no size: in no place
    assert not any(a and b for o in (point, point+100) for a, b in places(o, boxes))
    few = Text(("one",), boxes[:1])
    assert text_recall([few], [truth]) == pytest.approx(1/3) and text_recall([truth], [few]) == 1


def line(text, size, high, ink=(90, 20, 20), paper=(190, 220, 200)):
    image = Image.new("RGB", (10*size, high*size), paper)
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
    ImageDraw.Draw(image).text((size/2, high*size/2), text, font=font, fill=ink, anchor="lm")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()/255


def test_reading_is_right_repeats_and_uses_one_thread():
    "Also after a page, whose options the package would keep"
    d._rapidocr.cache_clear()
    scorer_of.cache_clear()
    words, sheet = line("Seven boats 42", 20, 2), line("Seven boats 42", 20, 4)
    alone, page = predictor(LINE), predictor(PAGE)
    first = alone(words)
    assert first.lines == ("Seven boats 42",) and first.boxes is None
    found = page(sheet)
    assert text_accuracy([found], [Text(("Seven boats 42",), torch.tensor([[10., 30, 160, 50]]))]) == 1
    (left, top), (right, bottom) = found.boxes[:, :2].amin(0).tolist(), found.boxes[:, 2:].amax(0).tolist()
    assert 0 <= left < 20 and 130 < right < 200 and 15 < top < 40 < bottom < 65
    assert alone(words).lines == first.lines and torch.equal(page(sheet).boxes, found.boxes)
    engine = d._rapidocr().__closure__
    engine = next(o.cell_contents for o in engine if hasattr(o.cell_contents, "text_rec"))
    for part in (engine.text_rec, engine.text_det):
        options = part.session.session.get_session_options()
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)


def test_the_reader_sees_red_as_red(monkeypatch):
    "rapidocr takes blue first"
    seen = []
    class Engine:
        txts = None
        def __init__(self, params): pass
        def __call__(self, pixels, **options):
            seen.append(pixels)
            return self
    import rapidocr
    monkeypatch.setattr(rapidocr, "RapidOCR", Engine)
    d._rapidocr.cache_clear()
    assert predictor(LINE)(PHOTO).lines == ()
    d._rapidocr.cache_clear()
    assert np.array_equal(seen[0], PHOTO.permute(1, 2, 0).mul(255).round().byte().numpy()[..., ::-1])


# ---------------------------------------------------------------- objects

def objects(boxes, scores=None, labels=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    y, x = torch.arange(80).view(1, 80, 1), torch.arange(90).view(1, 1, 90)
    left, top, right, bottom = boxes.T.reshape(4, -1, 1, 1)
    masks = (x >= left) & (x < right) & (y >= top) & (y < bottom)
    labels = torch.tensor(labels or [1]*len(boxes))
    return Objects(boxes, labels, None if scores is None else torch.tensor(scores), masks)


TWO = objects([[7, 3, 57, 53], [62, 3, 82, 53]])
FOUND = objects([[7, 3, 57, 42], [7, 58, 27, 78], [62, 3, 82, 53]], [.9, .8, .7]) # overlap .78, nothing there, exact


@pytest.mark.parametrize("masks", [False, True])
def test_average_precision_by_hand(masks):
    good, poor = (51+50*2/3)/101, 51/3/101 # up to an overlap of .75, and from .8
    got = coco_ap([FOUND], [TWO], masks)
    assert [got[o] for o in ("AP", "AP50", "AP75")] == pytest.approx([.6*good+.4*poor, good, good])
    perfect = objects(TWO.boxes.tolist(), [.6, .3])
    assert coco_ap([perfect]*2, [TWO]*2, masks) == dict.fromkeys(("AP", "AP50", "AP75"), pytest.approx(1))


def test_average_precision_takes_scores_classes_and_order():
    boxes = TWO.boxes.tolist()
    assert box_ap([objects(boxes, [.9, .8], [1, 2])], [TWO]) == pytest.approx(51/101)
    assert box_ap([objects([*boxes, [0, 60, 20, 75]], [.3, .6, .9])], [TWO]) == pytest.approx(2/3)
    assert box_ap([objects(boxes[:1], [.9])], [TWO]) == pytest.approx(51/101)
    assert box_ap([TWO_SURE], [objects(boxes[:1])]) == pytest.approx(1) and box_ap([], []) == 1
    half = [objects([[20, 20, 30, 24]], [.9])], [objects([[20, 20, 30, 30]])] # overlap .4: corners are no widths
    assert box_ap(*half) == mask_ap(*half) == 0
    assert box_ap([objects([], []), TWO_SURE], [TWO, objects([])]) == 0 # in the other picture
    assert box_ap([objects([], [])], [TWO]) == 0 and box_ap([objects([], [])], [objects([])]) == 1
    assert box_ap([TWO_SURE], [objects([])]) == 0
    assert box_ap([objects(boxes, [.4, .4])], [objects([])]) == 1 # not sure of them
    with pytest.raises(ValueError, match="needs scores"): box_ap([TWO], [TWO])
    with pytest.raises(ValueError, match="masks are to be compared"): mask_ap([replace(FOUND, masks=None)], [TWO])


TWO_SURE = objects(TWO.boxes.tolist(), [.9, .8])


def test_pooled_is_not_the_mean_over_pictures():
    truth = [objects([[0, 0, 20, 20]], labels=[1]), objects([[0, 0, 20, 20]], labels=[2])]
    found = [objects([[0, 0, 20, 20], [30, 0, 60, 30]], [.8, .9], [1, 2]), objects([[0, 0, 20, 20]], [.7], [2])]
    assert [box_ap([f], [t]) for f, t in zip(found, truth, strict=True)] == pytest.approx([1, 1])
    assert box_ap(found, truth) == pytest.approx(.75)


def test_the_truth_is_what_the_model_is_sure_of():
    "With a score of a half; the output's detections keep theirs"
    unsure = objects([*TWO.boxes.tolist(), [0, 60, 20, 75]], [.9, .5, .49])
    assert torch.equal(above(unsure).boxes, TWO.boxes) and above(unsure).scores is None
    assert torch.equal(above(unsure).masks, TWO.masks)
    judge = Judge("fixed", lambda: lambda image: unsure if image.mean() > .3 else FOUND, box_ap, sure=above)
    got = score(agreement(judge), torch.stack([PHOTO, OUTPUT]), PHOTO).tolist()
    assert got == pytest.approx([1, box_ap([FOUND], [TWO])])
    assert judged(judge, [PHOTO, OUTPUT], [PHOTO, PHOTO]) == pytest.approx(box_ap([unsure, FOUND], [TWO, TWO]))


class Fixed(torch.nn.Module): # with torchvision's interface
    def forward(self, images):
        assert len(images) == 1 and images[0].shape == PHOTO.shape and not self.training
        masks = torch.tensor([.6, .4]).view(2, 1, 1, 1).expand(2, 1, 32, 48)
        return [dict(boxes=TWO.boxes, labels=torch.tensor([3, 4]), scores=torch.tensor([.9, .1]), masks=masks)]


def test_a_detector_has_masks_where_they_are_likely():
    found = detector(Fixed())(PHOTO)
    assert found.masks.shape == (2, 32, 48) and found.masks[0].all() and not found.masks[1].any()
    assert found.labels.tolist() == [3, 4] and torch.equal(found.boxes, TWO.boxes)


@pytest.mark.parametrize("boxes, labels, more, message", [
    (torch.zeros(2, 4), [1], {}, "1 labels for boxes of shape"),
    (torch.zeros(1, 4), [1], dict(scores=torch.ones(2)), "1 labels, but 2 scores"),
    (torch.zeros(1, 4), [1], dict(masks=torch.ones(2, 3, 3)), "1 labels, but 2 masks")])
def test_objects_that_do_not_fit(boxes, labels, more, message):
    with pytest.raises(ValueError, match=message): Objects(boxes, torch.tensor(labels), **more)


# ---------------------------------------------------------------- class maps

def test_mean_iou_by_hand():
    truth = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 255]])
    found = torch.tensor([[0, 0, 1, 1], [1, 0, 7, 7]])
    assert mean_iou([found], [truth]) == pytest.approx((2/4+2/5+0)/3) # the invented class counts
    assert pixel_accuracy([found], [truth]) == pytest.approx(4/7)
    c = confusion([found], [truth])
    assert c[0].tolist()[:2] == [2, 1] and c[1, 7] == 1 and c.sum() == 7 # rows are the truth
    few = torch.where(truth == 255, 0, truth)
    assert mean_iou([few], [truth]) == 1
    with pytest.raises(ValueError, match="every pixel"): mean_iou([found], [torch.full((2, 4), 255)])
    with pytest.raises(ValueError, match="a class map of"): mean_iou([found], [truth[:1]])


def test_mean_iou_pools_pixels():
    rng = torch.Generator().manual_seed(0)
    found, truth = (list(torch.randint(3, (4, 6, 7), generator=rng)) for _ in range(2))
    f, t = torch.cat(found).flatten(), torch.cat(truth).flatten()
    sets = [((f == k) & (t == k)).sum().item()/((f == k) | (t == k)).sum().item() for k in range(3)]
    assert mean_iou(found, truth) == pytest.approx(np.mean(sets))


class Logits(torch.nn.Module): # a class where red is above its mean in training, another where it is below
    def forward(self, x): return dict(out=torch.nn.functional.avg_pool2d(torch.cat([-x[:, :1], x[:, :1]], 1), 4))


def test_a_segmenter_normalises_and_gives_the_size_of_its_image():
    flat = torch.full((3, 32, 48), .47)
    flat[0, :, 24:] = .5
    found = segmenter(Logits())(flat)
    assert found.shape == (32, 48) and found.dtype == torch.int64
    assert found[:, :20].sum() == 0 and found[:, 28:].float().mean() == 1 # .485 lies between


def test_torchvision_by_name_from_a_file(tmp_path, monkeypatch):
    name = "lraspp_mobilenet_v3_large"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_model(name, weights=None, weights_backbone=None)
    folder = tmp_path/"checkpoints"
    folder.mkdir()
    torch.save(model.state_dict(), folder/"lraspp_mobilenet_v3_large-d234d4ea.pth") # as torchvision's cache has it
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    found = torchvision_model(name)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), model.parameters(), strict=True))
    assert segmenter(torchvision_model(name, folder/"lraspp_mobilenet_v3_large-d234d4ea.pth"))(PHOTO).shape == (32, 48)


# ---------------------------------------------------------------- faces

def test_cosine():
    e = [torch.tensor(o) for o in ([3., 4.], [4., 3.], [-3., -4.])]
    assert cosine(e, [2*e[0], e[0], e[0]]) == pytest.approx((1+24/25-1)/3)
    assert [cosine([a], [b]) for a, b in ((None, None), (None, e[0]), (e[0], None))] == [1, 0, 0]


def test_faces_of_dlib():
    pytest.importorskip("dlib")
    photo = next(o for o in embedded_photos("held_out") if o.id == "astronaut").read()
    embed = predictor(FACE)
    blurred = torch.nn.functional.avg_pool2d(photo[None], 3, 1, 1)[0]
    same = cosine([embed(blurred)], [embed(photo)])
    assert embed(photo).shape == (128,) and .9 < same < 1 and embed(PHOTO) is None
    assert score(agreement(FACE), torch.stack([photo, blurred]), photo).tolist() == pytest.approx([1, same], abs=1e-3)


# ---------------------------------------------------------------- the run

@pytest.mark.slow
def test_compare_text(root, tmp_path):
    import papermill
    os.environ.pop("IN_TEST", None)
    toy = dict(out=str(tmp_path/"out"), models="nearest;bicubic", lines=3, degradations="bicubic",
               record_dir=str(tmp_path/"record"))
    run = partial(papermill.execute_notebook, root/"nbs/compare_text.ipynb", tmp_path/"out.ipynb", cwd=root,
                  progress_bar=False)
    run(toy)
    assert {o.name for o in (tmp_path/"record").iterdir()} == {"config.json", "metrics.parquet", "figure.jpg"}
    with pytest.raises(Exception, match="'line'.*'lines'"): run(toy | dict(line=3))

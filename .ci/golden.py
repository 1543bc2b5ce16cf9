"""Golden numbers of room 24, under `srnb/golden`. `golden.py osediff FOLDER` reads the pictures and log of OSEDiff's
authors and writes digests and logged numbers; no picture enters the repository. `golden.py drawn` computes the numbers
of the drawn pictures with NumPy and SciPy, without any function of srnb, and NIQE with pyiqa; it fails if pyiqa has
another PSNR or SSIM. `golden.py record FOLDER` writes the record of a check on the pictures of that folder."""
import argparse
import csv
import hashlib
import io
import json
import sys
import tarfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import correlate1d

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT/"srnb/golden"
STEADY = ("dark", "frame", "grey", "saturated", "soft") # their NIQE moves least if ties of its rounding fall otherwise
PARTS = ("lq", "gt", "osediff") # folders of the archive, in the order of a row


def write(
    name:str,   # of the file
    about:dict, # what stands above the rows
    rows:dict,  # group -> key -> value
)->Path:
    "One line a row, so that a change can be read"
    def group(o): return ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(o.items()))
    head = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in about.items())
    sets = ",\n".join(f" {json.dumps(k)}: {{\n{group(v)}}}" for k, v in rows.items())
    path = GOLDEN/f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{{\n{head},\n \"sets\": {{\n{sets}}}\n}}\n", encoding="utf-8")
    return path


def digest(data:bytes)->str: return hashlib.sha256(data).hexdigest()

def pixels(data:bytes)->str:
    x = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    return digest(f"{x.shape[:2]}".encode() + x.tobytes())[:16]

def osediff(
    folder:Path, # holds osediff_half.tar and osediff_log.csv
)->Path:
    from srnb.protocols import OSEDIFF
    with open(folder/"osediff_log.csv", newline="") as f: log = list(csv.DictReader(f))
    columns = list(log[0])[2:]
    variants = {m.name: m.variant for m in OSEDIFF.measures}
    rows = {s.name: {} for s in OSEDIFF.sets}
    with tarfile.open(folder/"osediff_half.tar", "r:") as tar:
        for o in log:
            data = [tar.extractfile(f"{o['set']}/{part}/{o['file']}").read() for part in PARTS]
            rows[o["set"]][Path(o["file"]).stem] = [*map(digest, data), *map(pixels, data),
                                                    *(float(o[c]) for c in columns)]
    about = dict(source="cswry/OSEDiff, preset/datasets, logs of 23 October 2024", made_by="pyiqa 0.1.10",
                 covers="50 of 100 pictures of realsr, 47 of 93 of drealsr: those that we have had in hand",
                 row=["SHA-256 of the low-quality file", "of the ground truth", "of OSEDiff's output",
                      "digests of their pixels", "", "", *columns],
                 variants=[variants[c] for c in columns])
    return write("osediff", about, {k: v for k, v in rows.items() if v})


def luma(x): # (3,H,W) uint8 -> (H,W) float64, 16 to 235
    r, g, b = x.astype(np.float64)/255
    return 65.481*r + 128.553*g + 24.966*b + 16

def cut(x, border): return x[border:x.shape[0]-border, border:x.shape[1]-border]

def psnr(sr, gt, border):
    mse = np.mean(np.square(cut(luma(sr), border) - cut(luma(gt), border)))/255**2
    return 10*np.log10(1/(mse + 1e-8))

def ssim(sr, gt, border):
    a, b = (np.round(cut(luma(o), border)) for o in (sr, gt))
    taps = np.exp(-np.arange(-5, 6)**2/(2*1.5**2))
    taps /= taps.sum()
    def mean(x): return cut(correlate1d(correlate1d(x, taps, 0), taps, 1), 5)
    c1, c2, p, q = (.01*255)**2, (.03*255)**2, mean(a), mean(b)
    spread = mean(a*a) - p*p + mean(b*b) - q*q
    structure = np.maximum((2*(mean(a*b) - p*q) + c2)/(spread + c2), 0) # pyiqa's own floor
    return float(np.mean((2*p*q + c1)/(p*p + q*q + c1)*structure))


def drawn()->Path:
    import pyiqa
    import torch

    from srnb.protocols import OSEDIFF, SEESR, drawn_pairs
    from srnb.rewards import pyiqa_metric, scorer_of
    pairs = {k: tuple(o.numpy() for o in v) for k, v in drawn_pairs().items()}
    def theirs(id, **options):
        model = pyiqa.create_metric(id, device=torch.device("cpu"), **options)
        def one(sr, gt): return float(model(*(torch.from_numpy(o)[None].double()/255 for o in (sr, gt))))
        return {k: one(*v) for k, v in pairs.items()}
    rows, by, numbers = {}, {}, f"NumPy {version('numpy')}, SciPy {version('scipy')}"
    for protocol in (OSEDIFF, SEESR):
        for m in protocol.measures[:2]:
            ours = {k: float((psnr if m.name == "psnr" else ssim)(*v, m.border)) for k, v in pairs.items()}
            other = theirs(m.name, test_y_channel=True, color_space="ycbcr", crop_border=m.border)
            far = max(abs(ours[k] - other[k]) for k in pairs)
            print(f"{m.variant}: pyiqa {version('pyiqa')} differs by {far:.1g} at most")
            if not far <= m.tolerance/2: raise SystemExit(f"{m.variant}: by hand {ours}, by pyiqa {other}")
            rows[m.variant], by[m.variant] = ours, numbers
    niqe = next(m for m in OSEDIFF.measures if m.name == "niqe") # no other code has its parameters
    of = scorer_of(pyiqa_metric("niqe"))
    rows[niqe.variant] = {k: float(of(torch.from_numpy(pairs[k][0])[None].float()/255, None)) for k in STEADY}
    by[niqe.variant] = f"pyiqa {version('pyiqa')}"
    return write("drawn", dict(made_by=by, digests={
        k: [hashlib.sha256(o.tobytes()).hexdigest() for o in v] for k, v in pairs.items()}), rows)


def record(
    folder:Path, # of the pictures
)->Path:
    "What the check says of the logged pictures, for the page of room 24"
    import pandas as pd

    from srnb.core import open_run, write_table
    from srnb.protocols import OSEDIFF, check_protocol, missing_measures
    missing = missing_measures(OSEDIFF.measures)
    t = check_protocol(replace(OSEDIFF, measures=tuple(m for m in OSEDIFF.measures if m.name not in missing)), folder)
    t = t[t.found.notna() & (t["set"] != "drawn")]
    rows = [dict(image=f"{o.set}/{o.picture}", seed=0, metric=o.measure, variant=k, value=getattr(o, k))
            for o in t.itertuples() for k in ("said", "found")]
    out = open_run(ROOT/"nbs/_records/protocols", dict(protocol="osediff", unchecked=sorted(missing)))
    return write_table(out/"metrics.parquet", pd.DataFrame(rows))


def main()->int:
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("what", choices=["osediff", "drawn", "record"])
    a.add_argument("folder", type=Path, nargs="?", help="of the pictures and the log")
    a = a.parse_args()
    path = drawn() if a.what == "drawn" else osediff(a.folder) if a.what == "osediff" else record(a.folder)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__": sys.exit(main())

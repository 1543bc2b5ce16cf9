"""Golden numbers of room 24, under `srnb/golden`. `golden.py osediff FOLDER` reads the pictures and the log of OSEDiff's
authors and writes digests and logged numbers; no picture enters the repository."""
import argparse
import csv
import hashlib
import json
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT/"srnb/golden"
PARTS = ("lq", "gt", "osediff") # folders of the archive, in the order of a row


def write(
    name:str,   # of the file
    about:dict, # what stands above the rows
    rows:dict,  # group -> key -> list
)->Path:
    "One line a row, so that a change can be read"
    def group(o): return ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(o.items()))
    head = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in about.items())
    sets = ",\n".join(f" {json.dumps(k)}: {{\n{group(v)}}}" for k, v in rows.items())
    path = GOLDEN/f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{{\n{head},\n \"sets\": {{\n{sets}}}\n}}\n", encoding="utf-8")
    return path


def osediff(
    folder:Path, # holds osediff_half.tar and osediff_log.csv
)->Path:
    from srnb.protocols import OSEDIFF
    with open(folder/"osediff_log.csv", newline="") as f: log = list(csv.DictReader(f))
    columns = list(log[0])[2:]
    variants = {m.name: m.variant for m in OSEDIFF.measures}
    rows = {s.name: {} for s in OSEDIFF.sets}
    with tarfile.open(folder/"osediff_half.tar", "r:") as tar:
        def digest(set, part, file):
            return hashlib.sha256(tar.extractfile(f"{set}/{part}/{file}").read()).hexdigest()
        for o in log:
            digests = [digest(o["set"], part, o["file"]) for part in PARTS]
            rows[o["set"]][Path(o["file"]).stem] = [*digests, *(float(o[c]) for c in columns)]
    about = dict(source="cswry/OSEDiff, preset/datasets, logs of 23 October 2024", made_by="pyiqa 0.1.10",
                 covers="50 of 100 pictures of realsr, 47 of 93 of drealsr: those that we have had in hand",
                 row=["SHA-256 of the low-quality file", "of the ground truth", "of OSEDiff's output", *columns],
                 variants=[variants[c] for c in columns])
    return write("osediff", about, rows)


def main()->int:
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("what", choices=["osediff"])
    a.add_argument("folder", type=Path, nargs="?", help="of the pictures and the log")
    a = a.parse_args()
    path = osediff(a.folder)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__": sys.exit(main())

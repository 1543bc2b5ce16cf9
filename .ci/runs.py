"Run notebooks by papermill into nbs/_runs: `runs.py 'bench_*'`, or one of them with parameters"
import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def artefacts(
    out_dir:Path, # a run's folder
)->list[str]:     # lines
    "Where tables and figures of a run lie"
    kinds = {o: "table" for o in (".parquet", ".csv")} | {o: "figure" for o in (".png", ".jpg", ".svg")}
    kinds[".html"] = "page"
    return [f"{kinds[p.suffix]}: {p.relative_to(ROOT)}" for p in sorted(out_dir.glob("*")) if p.suffix in kinds]


def main()->int:
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("notebook", help="name or glob of notebooks in nbs/, without .ipynb")
    a.add_argument("--out", help="name of the executed notebook in nbs/_runs (default: the notebook's own)")
    a.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a papermill parameter")
    a = a.parse_args()
    found = sorted((ROOT/"nbs").glob(f"{a.notebook}.ipynb"))
    if not found:
        print(f"There is no nbs/{a.notebook}.ipynb, so nothing was run.")
        return 0 if "*" in a.notebook else 1
    params = [o for name, value in a.p for o in ("-p", name, value)]
    failed = []
    for nb in found:
        start, out = time.monotonic(), f"nbs/_runs/{a.out or nb.stem}.ipynb"
        print(f"{nb.stem} -> {out}", flush=True)
        cmd = [sys.executable, "-m", "papermill", f"nbs/{nb.name}", out, "--log-output", "--no-progress-bar", *params]
        rc = subprocess.run(cmd, cwd=ROOT).returncode
        print(f"{nb.stem}: {'ok' if rc == 0 else f'FAILED ({rc})'}, {time.monotonic()-start:.0f} s", flush=True)
        if rc: failed.append(nb.stem)
    if failed:
        print("failed: " + ", ".join(failed))
        return 1
    print(f"executed notebook: {out}" if len(found) == 1 else f"executed notebooks: {len(found)} in nbs/_runs")
    for folder in [v for name, v in a.p if name == "out"]: print(*artefacts(ROOT/folder), sep="\n")
    return 0


if __name__ == "__main__": sys.exit(main())

"Execute notebooks in place, so that their pages show what the code says now: `pages.py [name ...]`, all by default"
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from readme import directives, skip_exec

ROOT = Path(__file__).resolve().parent.parent


def skips(
    cell, # of a notebook
)->bool:  # whether a page never runs it
    "Cells that only nbdev runs"
    return "nbdev_export(" in cell.source or directives(cell.source).get("eval") == "false"


def execute(
    path:Path, # notebook, rewritten when it ran to its end
)->None:
    "Run a notebook as nbs/ would see it and save its outputs; on an error the file stays as it was"
    nb = nbformat.read(path, as_version=4)
    kept = {i: c.source for i, c in enumerate(nb.cells) if c.cell_type == "code" and skips(c)}
    for i in kept: nb.cells[i].source = ""
    NotebookClient(nb, timeout=None, kernel_name="python3", record_timing=False, coalesce_streams=True,
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    for i, source in kept.items(): nb.cells[i].source = source
    part = path.with_name(f".part-{path.name}")
    nbformat.write(nb, part)
    os.replace(part, path)


def main()->int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found") # tqdm's, which would stand there with a path
    os.environ.pop("MPLBACKEND", None) # the kernel's own keeps figures in the notebook
    names = [o.removeprefix("nbs/").removesuffix(".ipynb") for o in sys.argv[1:]]
    paths = [ROOT/"nbs"/f"{o}.ipynb" for o in names]
    if missing := [p.name for p in paths if not p.exists()]:
        print("no such notebook in nbs/: " + ", ".join(missing))
        return 1
    if not names:
        paths = sorted((ROOT/"nbs").glob("[!_.]*.ipynb"))
        paths = [p for p in paths if not skip_exec(nbformat.read(p, as_version=4))]
        paths.sort(key=lambda p: (p.stem == "index", not p.stem[0].isdigit(), p.stem)) # rooms, experiments, index
    for p in paths:
        start = time.monotonic()
        try: execute(p)
        except CellExecutionError as e:
            print(f"{p.name}: FAILED, file left as it was\n{e}")
            return 1
        print(f"{p.name}: {time.monotonic()-start:.1f} s", flush=True)
    return subprocess.run([str(Path(sys.executable).parent/"nbdev_clean")], cwd=ROOT).returncode


if __name__ == "__main__": sys.exit(main())

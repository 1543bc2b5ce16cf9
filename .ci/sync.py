"Export, clean and write README.md; fail if that changed a file, which means that the sources were out of step"
import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def snapshot(
    root:Path, # the repository
)->dict:       # relative path -> digest
    "Digests of everything that export, clean and README may touch"
    nbs = [p for p in (root/"nbs").rglob("*.ipynb") if not any(o[0] in "._" for o in p.relative_to(root).parts)]
    files = [*nbs, *(root/"srnb").rglob("*.py"), root/"README.md", root/"_quarto.yml", root/"pyproject.toml"]
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files) if p.exists()}


def drift(
    before:dict, # snapshots
    after:dict,
)->list[str]:    # "state path"
    "What differs between two snapshots"
    state = lambda p: "new" if p not in before else "gone" if p not in after else "rewritten" # noqa: E731
    return [f"{state(p)}: {p}" for p in sorted({*before, *after}) if before.get(p) != after.get(p)]


def main()->int:
    before = snapshot(ROOT)
    if not any(p.startswith("nbs/") for p in before):
        print("no notebooks under nbs/: nothing could be exported or tested")
        return 1
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} # under IN_TEST nbdev_export returns without a word
    bin = Path(sys.executable).parent
    for cmd in ([bin/"nbdev_export"], [bin/"nbdev_clean"], [sys.executable, ".ci/readme.py"]):
        if rc := subprocess.run(cmd, cwd=ROOT, env=env).returncode: return rc
    changed = drift(before, snapshot(ROOT))
    for o in changed: print(o)
    if changed: print("These were out of step with their notebooks and are written again now: look and commit.")
    return 1 if changed else 0


if __name__ == "__main__": sys.exit(main())

"Resolve pyproject.toml with its dev extra into plain name==version lines; torch brings its own CUDA packages"
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
cmd = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--extra", "dev", "--upgrade", "--quiet",
       "--constraint", ".ci/constraints.txt", "--python-version", "3.11", # 3.11.0, not this interpreter's
       "--no-annotate", "--no-header", "--no-emit-index-url", "--no-emit-find-links"]
lines = subprocess.run(cmd, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
lines = [o for o in lines if not re.match(r"(nvidia|cuda|triton)\b", o)]
bad = [o for o in lines if not re.fullmatch(r"[\w.\-]+==[\w.+!]+", o)]
if bad: sys.exit(f"not plain name==version lines: {bad}")
(ROOT/".ci/requirements.lock").write_text("\n".join(lines)+"\n")
print(f"{len(lines)} packages locked")

"Render the site into _docs with the reader's own Quarto; nothing is downloaded or installed"
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main()->int:
    if not shutil.which("quarto"):
        print("make docs needs Quarto 1.4 or newer, which comes from quarto.org and not with Python: install it, see\n"
              "that `quarto --version` answers, and run make docs again. The notebooks can also be read in Jupyter.")
        return 1
    work, site = ROOT/"_proc", ROOT/"_docs"
    shutil.rmtree(work, ignore_errors=True) # nbdev trusts a stale one
    process = "from nbdev.serve import proc_nbs; proc_nbs(force=True)"
    subprocess.run([sys.executable, "-c", process], cwd=ROOT, check=True)
    for p in (ROOT/"nbs/_records").rglob("*.png"): # nbdev leaves folders that begin with _ behind
        to = work/p.relative_to(ROOT/"nbs")
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(p, to)
    if rc := subprocess.run(["quarto", "render", "--no-execute"], cwd=work).returncode: return rc
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(work/"_docs", site)
    shutil.rmtree(work)
    print("the site: _docs/index.html")
    return 0


if __name__ == "__main__": sys.exit(main())

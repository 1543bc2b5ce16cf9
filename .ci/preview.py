"The site without Quarto: pandoc sets the equations, smalldocs lays out the pages; plainer, but the same text and links"
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml
from typeset import typeset

STYLE = """<style>
:root { --sd-body-width: 930px; --sd-sidebar-width: 250px; --sd-margin-width: 220px; }
.equation { display: flex; align-items: center; gap: 1em; overflow-x: auto; overflow-y: hidden; margin: 1em 0; padding: .2em 0; }
.equation math { flex: 1; }
math { font-size: 1.05em; }
</style>
"""


def render(
    work:Path, # from `docs.process`; the site goes to its _docs
)->list[str]:  # problems
    "Number, typeset and lay out"
    bad = []
    for p in sorted(work.glob("*.ipynb")):
        nb = nbformat.read(p, as_version=4)
        bad += [f"{p.name}: {o}" for o in typeset(nb)]
        nbformat.write(nb, p)
    (work/"preview.html").write_text(STYLE)
    config = yaml.safe_load((work/"_quarto.yml").read_text())
    config.pop("execute", None) # Quarto's; smalldocs runs no code
    for o in ("html-math-method", "grid", "code-overflow", "tbl-colwidths"): config["format"]["html"].pop(o, None)
    config["format"]["html"]["include-in-header"] = "preview.html"
    (work/"_quarto.yml").unlink(missing_ok=True) # if it is a link, the repository's stays as it is
    (work/"_quarto.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    tool = shutil.which("smalldocs", path=str(Path(sys.executable).parent))
    done = subprocess.run([tool, "render", "--quiet", "."], cwd=work, capture_output=True, text=True)
    said = [o for o in (done.stdout+done.stderr).splitlines() if o.strip()]
    return bad + said + ([f"smalldocs failed ({done.returncode})"] if done.returncode else [])

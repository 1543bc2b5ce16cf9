"The site without Quarto, plain: pandoc, which Quarto calls too, makes one page of each notebook"
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pypandoc
import yaml
from readme import directives, options
from site_checks import check_site

STYLE = """<style>
body { max-width: 60em; margin-left: 16em; font-size: 1em; }
nav.site { position: fixed; inset: 0 auto 0 0; width: 13em; overflow-y: auto; padding: 1em; font-size: .85em; }
span[id^=eq-]::after { content: "(" attr(id) ")"; float: right; }
</style>"""
PANDOC = ["--from=markdown-citations", "--to=html5", "--mathml", "--standalone", "--toc", "--css=site.css",
          "--variable=header-includes=<link rel='icon' href='favicon.svg'>", "--include-before-body=nav.html",
          "--wrap=none", "--fail-if-warnings"]


def shown(out, said:dict)->str: # an output, with the options of its cell -> markdown
    data, kind = out.get("data", {}), next((k for k in out.get("data", {}) if k.startswith("image/")), None)
    if "text/markdown" in data: return str(data["text/markdown"])
    if "text/html" in data: return f"~~~~ {{=html}}\n{data['text/html']}\n~~~~"
    if not kind: return f"~~~~\n{out.get('text', data.get('text/plain', '')).rstrip()}\n~~~~"
    place, alt = "#"*("label" in said) + said.get("label", ""), said.get("fig-alt", "").replace('"', "”")
    return f"![{said.get('fig-cap', '')}](data:{kind};base64,{''.join(data[kind].split())}){{{place} alt=\"{alt}\"}}"


def markdown(nb)->str: # of a processed notebook; labels become places, and what refers to them links
    parts = []
    for c in nb.cells:
        code = re.sub(r"^#\|.*\n?", "", c.source, flags=re.M)
        if c.cell_type != "code": parts.append(c.source)
        elif directives(c.source).get("echo") != "false": parts.append(f"~~~~\n{code}\n~~~~")
        parts += [shown(o, options(c.source)) for o in c.get("outputs", [])]
    text = "\n\n".join(parts).replace("---\ndescription:", "---\nsubtitle:", 1)
    text = re.sub(r"(\$\$[^$]+\$\$)[ \t]*\{#(eq-[\w-]+)\}", r"[\1]{#\2}", text)
    return re.sub(r"(?<![\w`@])@((?:eq|fig)-[\w-]*\w)", r"[\1](#\1)", text)


def render(work:Path)->list[str]: # what `docs.process` has written -> problems; the site goes to its _docs
    site, bad = work/"_docs", []
    shutil.copytree(work, site, ignore=shutil.ignore_patterns("*.ipynb", "*.yml"))
    listed = yaml.safe_load((work/"_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    rows = []
    for s in listed:
        rows += [f"<p>{s['section']}</p>", *(f"<a href='{o['href']}'>{o['text']}</a><br>" for o in s["contents"])]
    (work/"nav.html").write_text(STYLE + "<nav class='site'>" + "\n".join(rows) + "</nav>")
    for p in sorted(work.glob("*.ipynb")):
        cmd, text = [pypandoc.get_pandoc_path(), *PANDOC], markdown(nbformat.read(p, as_version=4))
        done = subprocess.run(cmd, input=text, cwd=work, capture_output=True, text=True)
        if done.returncode: bad.append(f"{p.name}: {done.stderr.strip()}")
        (site/f"{p.stem}.html").write_text(re.sub(r"(href=[\"']\w+)\.ipynb", r"\1.html", done.stdout))
    return bad + check_site(site)

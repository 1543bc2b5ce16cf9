"""What the package makes for a browser, in Debian's Chromium: sliders of the rendered pages move, a ranking page is
filled in and its answers are read back, without a script error or a request to elsewhere. Needs `chromium`."""
import functools
import http.server
import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@contextmanager
def served(
    folder:Path, # of a site
)->Iterator[str]: # its address
    "A folder on a free port of this machine"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}"
    finally: server.shutdown()


def watch(
    page:Page,    # before its first address
    site:str,     # address; every request to anywhere else is a problem
    bad:list[str],# problems are added here
)->None:
    "Note script errors, failed requests and requests that leave the site"
    where = lambda: page.url.rpartition("/")[2] # noqa: E731
    page.on("pageerror", lambda e: bad.append(f"{where()}: script error: {e}"))
    page.on("console", lambda m: m.type == "error" and bad.append(f"{where()}: {m.text[:200]}"))
    page.on("response", lambda r: r.status >= 400 and bad.append(f"{where()}: {r.status} {r.url}"))
    own = (site, "data:", "blob:", "about:")
    page.on("request", lambda r: r.url.startswith(own) or bad.append(f"{where()}: asks for {r.url[:100]}"))


def check_slider(page:Page, site:str, name:str)->list[str]:
    "Keys and mouse move the cut, and the picture above is really cut there"
    page.goto(f"{site}/{name}.html")
    figure = page.locator("figure.srnb-slider.live").first
    if not figure.count(): return [f"{name}: no slider"]
    figure.scroll_into_view_if_needed()
    handle = figure.locator("input[type=range]")
    cut = "f => [f.style.getPropertyValue('--cut'), getComputedStyle(f.querySelector('.after')).clipPath]"
    handle.focus()
    seen = []
    for key in ("Home", "ArrowRight", "End", "ArrowLeft"):
        page.keyboard.press(key)
        seen.append(figure.evaluate(cut))
    box = handle.bounding_box()
    page.mouse.click(box["x"]+box["width"]/4, box["y"]+box["height"]/2)
    seen.append(figure.evaluate(cut))
    print(f"slider of {name}: {[o for o, _ in seen]}")
    values = [float(o.rstrip("%")) for o, _ in seen]
    bad, (home, right, end, left, click) = [], values
    if not (home == 0 < right < left < end == 100 and 15 < click < 35): bad.append(f"{name}: the slider goes {values}")
    if len({clip for _, clip in seen}) != 5: bad.append(f"{name}: the picture is not cut where the handle is: {seen}")
    return bad


def check_ranking(page:Page, work:Path)->list[str]:
    "A study of three methods: one image by mouse, one by keys with an undo, a reload between; the JSON is read back"
    import torch

    from srnb.core import generator, write_image
    from srnb.look import read_answers, top_votes, write_ranking
    g = generator(0)
    for method in ("good", "fair", "poor"):
        for image in ("a", "b"):
            (work/method).mkdir(exist_ok=True)
            write_image(work/method/f"{image}.png", torch.rand(3, 40, 60, generator=g))
    _, key = write_ranking({m: work/m for m in ("good", "fair", "poor")}, work/"study.html", seed=1)
    bad = []
    with served(work) as site:
        watch(page, site, bad)
        page.goto(f"{site}/study.html")
        page.locator("#participant").fill("p1")
        page.locator("#begin").click()
        for letter in "BAC": page.locator(f"figure[data-letter={letter}] .pick").click()
        page.locator("#next").click()
        page.keyboard.press("a")
        page.reload()
        if page.locator("#start").is_visible(): page.locator("#begin").click()
        for key_pressed in ("Backspace", "c", "b", "a"): page.keyboard.press(key_pressed)
        page.screenshot(path=str(work/"ranking.png"))
        page.locator("#next").click()
        with page.expect_download() as download: page.locator("#download").click()
        download.value.save_as(work/"p1.json")
    answers = read_answers(work/"p1.json", key)
    print(top_votes(answers, "image").to_string(index=False))
    images = json.loads(key.read_text())["images"].values()
    order = {v["image"]: {m: letter for letter, m in v["methods"].items()} for v in images}
    first, second = order
    for image, wish in ((first, "BAC"), (second, "CBA")):
        got = "".join(order[image][m] for m in answers[answers.image == image].sort_values("rank").method)
        if got != wish: bad.append(f"ranking page: {image} was ranked {wish}, its file says {got}")
    return bad


def main()->int:
    chromium, site = os.environ.get("CHROMIUM") or shutil.which("chromium"), ROOT/"_docs"
    names = [p.stem for p in sorted(site.glob("*.html")) if '<figure class="srnb-slider"' in p.read_text()]
    if not chromium:
        print("make docs-browser needs Chromium: on Debian `apt-get install chromium`, or CHROMIUM=/path/to/it")
        return 1
    if not names:
        print("there is no page with a slider in _docs; make preview writes it")
        return 1
    bad = []
    with sync_playwright() as p, tempfile.TemporaryDirectory() as tmp, served(site) as address:
        browser = p.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        watch(page, address, bad)
        for name in names: bad += check_slider(page, address, name)
        bad += check_ranking(browser.new_page(viewport={"width": 1400, "height": 900}), Path(tmp))
        browser.close()
    for o in bad: print(o)
    print(f"{len(bad)} problems")
    return 1 if bad else 0


if __name__ == "__main__": sys.exit(main())

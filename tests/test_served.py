"Metrics behind an address: a run that is scored by one, away before work, dead in the middle, another version, a token"
import base64
import io
import json
import threading
import time
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import same_result
from PIL import Image

from srnb.align import Bottom, Method, Run, Top, align
from srnb.core import RunOccupied, to_bytes
from srnb.pairs import Logistic
from srnb.rewards import Metric, MetricUnavailable, Reward, check_available, drop_scorers, score
from srnb.runs import Base, Data, Judging, record_of
from srnb.served import Served
from srnb.training import Loop


def brightness(sr, gt): return torch.stack([to_bytes(o).sum().double()/o.numel() for o in sr])


@pytest.fixture
def server():
    "A server of brightness; `said` tells what it does, and what it was asked"
    said = SimpleNamespace(version="brightness 1", headers=[], pictures=0, dies=None, wait=0., moved=None)

    class Handler(BaseHTTPRequestHandler):
        def answer(self, what, code=200):
            body = json.dumps(what).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(BrokenPipeError): self.wfile.write(body) # who asked may have gone

        def do_GET(self):
            said.headers.append(self.headers.get("Authorization"))
            if not said.moved: return self.answer(dict(version=said.version))
            self.send_response(302)
            self.send_header("Location", said.moved)
            self.end_headers()

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(said.wait)
            if said.dies is not None and said.pictures >= said.dies: return self.answer({}, 503)
            assert asked["gt"] is None
            pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(o)))) for o in asked["sr"]]
            said.pictures += len(pictures)
            self.answer(dict(scores=[int(o.sum(dtype=int))/o.size for o in pictures], version=said.version))

        def log_message(self, *args): pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(.02,), daemon=True).start()
    said.address = f"http://127.0.0.1:{http.server_port}/score"
    said.stop = lambda: (http.shutdown(), http.server_close())
    drop_scorers()
    yield said
    said.stop()
    drop_scorers()


@pytest.fixture
def run(tiny, tmp_path):
    "metric -> a tiny run that it ranks"
    def make(metric, out="run"):
        method = Method(winners=Top(1), losers=Bottom(), link=Logistic(10.))
        judging = Judging(Reward("mine", nr=(metric,)), m=2, judges=("psnr_y",), eval_m=2)
        return Run(str(tmp_path/out), method, Data(size=64, places=1, take=2),
                   Base(str(tiny), precision="no", sample_steps=1), judging,
                   Loop(steps=2, lr=1e-2, save_every=2, log_every=1, log_with="none"), rank=2, batch=1, patch=32)
    return make


def served(server, **more): return Served("bright", "nr", True, address=server.address, retries=0, **more)


def test_a_run_that_a_server_scores_is_the_run_that_is_scored_here(server, run, tmp_path):
    "To the bit; killed with the server in the middle of the bank it goes on, and no picture is sent twice"
    here = align(run(Metric("bright", "nr", True, lambda: brightness), "here"))
    metric = served(server, batch=1)
    server.dies = 1+2+1 # the ramp; the first group; half of the second
    with pytest.raises(MetricUnavailable, match="bright: no answer from 127.0.0.1.*503.*what was scored is kept"):
        align(run(metric))
    server.dies, before = None, server.pictures
    drop_scorers()
    out = align(run(metric))
    same_result(out, here)
    ramp, crops, photographs = 1, 2, 2
    assert server.pictures-before == ramp+2*(crops-1)+photographs*(2+2+1)
    said = json.loads((out/"config.json").read_text())["params"]
    assert said["stands_for"]["served"] == {"bright": f"{metric.place}: brightness 1"}
    assert "served" not in json.loads((here/"config.json").read_text())["params"]["stands_for"]
    server.version = "brightness 2"
    drop_scorers()
    with pytest.raises(RunOccupied, match="served"): align(run(metric))


def test_no_redirect_is_followed(server, monkeypatch):
    "Another host would get pictures and token"
    monkeypatch.setenv("TOK", "secret")
    server.moved = server.address.replace("127.0.0.1", "localhost")
    with pytest.raises(MetricUnavailable, match="302"): check_available([served(server, token="TOK")], (64, 64), "cpu")
    assert server.headers == ["Bearer secret"] # asked once, where it was meant to be


def test_a_server_and_a_shared_folder_do_not_go_together(server, run, tmp_path):
    "Scores are kept by name, and another version of the server would share them"
    with pytest.raises(ValueError, match="Run.banks shares scores .* bright"):
        align(replace(run(served(server)), banks=str(tmp_path/"banks")))


@pytest.mark.parametrize("token", ["se\ncret", "ge heim", "größer"])
def test_a_token_that_no_header_holds_is_not_shown(server, monkeypatch, token):
    monkeypatch.setenv("TOK", token)
    with pytest.raises(MetricUnavailable, match="the value of TOK must be one word of ASCII") as e:
        check_available([served(server, token="TOK")], (64, 64), "cpu")
    assert token not in str(e.value)


def test_a_server_that_is_away_is_found_out_before_any_work(server, run, tmp_path, idle):
    server.stop()
    with pytest.raises(MetricUnavailable, match="metric bright: no answer from 127.0.0.1.*start the server"):
        align(run(served(server)))
    assert not (tmp_path/"run").exists()


def test_an_answer_that_takes_too_long(server):
    metric, server.wait = served(server, timeout=.2), 1.
    with pytest.raises(MetricUnavailable, match="timed out"): score(metric, torch.zeros(2, 3, 8, 8))


def test_it_is_asked_again(server, monkeypatch):
    pauses = []
    def pause(seconds):
        pauses.append(seconds)
        server.dies = None if len(pauses) == 2 else server.dies
    monkeypatch.setattr("srnb.served.time", SimpleNamespace(sleep=pause))
    server.dies, images = 0, torch.rand(3, 3, 8, 8)
    assert torch.equal(score(replace(served(server), retries=3), images), brightness(images, None))
    assert pauses == [.5, 1.]


def test_a_token_is_sent_and_written_nowhere(server, run, monkeypatch):
    metric = served(server, token="BRIGHT_TOKEN")
    monkeypatch.setenv("BRIGHT_TOKEN", "s3cret")
    check_available([metric])
    assert server.headers == ["Bearer s3cret"]
    said = record_of(run(metric), served=metric.version)
    assert "BRIGHT_TOKEN" in json.dumps(said) and "s3cret" not in json.dumps(said)+repr(metric)
    monkeypatch.delenv("BRIGHT_TOKEN")
    drop_scorers()
    with pytest.raises(MetricUnavailable, match="no BRIGHT_TOKEN"): check_available([metric])


@pytest.mark.parametrize("change, named", [
    (dict(address="ftp://here/x"), "must be http"), (dict(address="http://"), "must be http"),
    (dict(address="http://a:b@here/x"), "may hold no user"), (dict(address="http://here/x?key=1"), "query"),
    (dict(timeout=0.), "timeout > 0"), (dict(retries=-1), "retries >= 0"), (dict(batch=0), "batch >= 1")])
def test_bad_fields(change, named):
    with pytest.raises(ValueError, match=named): replace(Served("m", "nr", True, address="http://here/x"), **change)

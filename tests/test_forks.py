"A forked process is like any other: arguments, environment, folder, output, exit code, kill; a test leaves none behind"
import os
import signal
import sys

import forks
import pytest


def work(a, b):
    print(os.getpid(), a+b, os.environ["WHO"], os.getcwd())
    print("a warning", file=sys.stderr)
    os.system("echo from a child")


def boom(): raise ValueError("boom")


def slow(): return signal.pause()


class Owner:
    @staticmethod
    def step(k): print("step", k, flush=True)


def steps():
    for k in range(10**9): Owner.step(k)


def test_function(forked, tmp_path):
    run = forked(work, 1, 2, cwd=tmp_path, WHO="me")
    assert run.wait() == 0 and run.pid != os.getpid()
    assert sorted(run.out.splitlines()) == sorted([f"{run.pid} 3 me {tmp_path}", "from a child"])
    assert run.err == "a warning\n"


def test_code_and_module(forked, tmp_path):
    run = forked("-c", "import sys; print(sys.argv[1:], 'torch' in sys.modules); sys.exit(3)", "a", 5)
    assert run.wait() == 3 and run.out == "['a', '5'] True\n"
    (tmp_path/"mine.py").write_text("import sys\nif __name__ == '__main__': print(sys.argv[1:])\n")
    run = forked("-m", "mine", "x", cwd=tmp_path)
    assert run.wait() == 0 and run.out == "['x']\n", run.err


def test_errors_and_signals(forked):
    run = forked(boom)
    assert run.wait() == 1 and "ValueError: boom" in run.err
    run = forked(slow)
    assert run.poll() is None and run.wait(.05) is None
    run.kill()
    assert run.wait() == -signal.SIGKILL == run.poll()


@pytest.mark.parametrize("after", [0., .02])
def test_killed(forked, after):
    run = forked(forks.cut, "test_forks.Owner.step", 3, after, steps)
    assert run.wait() == -signal.SIGKILL and run.out == "".join(f"step {k}\n" for k in range(4 if after else 3))


def test_temporary_folders_go(forked, tmp_path):
    code = "import tempfile; t = tempfile.TemporaryDirectory(); globals()['t'] = t; print(t.name)"
    run = forked("-c", code)
    assert run.wait() == 0 and not os.path.exists(run.out.strip())

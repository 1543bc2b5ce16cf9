"""Processes that begin warm: a server imports torch and the rooms once and forks, so that a command line, a worker or a
notebook has a process of its own in a tenth of a second, whose end, kill and output are those of any other process.

The session's `forked` fixture (conftest.py) starts them and ends those that a failing test leaves behind:

    run = forked("-m", "srnb.training", "config.json")      # as python -m would, with sys.argv
    run = forked("-c", code, "an", "argument", RANK="1")    # as python -c would; keywords are environment variables
    run = forked(worker, folder, 3, cwd=tmp_path)           # a function of a test module, called with these arguments
    assert run.wait() == 0, run.err

The server only imports. What an import loads, or reads from the environment, as HF_HOME, is tested by a process of
`sys.executable`."""
import atexit
import itertools
import multiprocessing
import os
import pkgutil
import random
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
NUMBER = itertools.count()


def start()->None:
    "Start the server of this process, if it does not run: with its import path, and without what a test run sets"
    from multiprocessing import forkserver
    before = dict(os.environ)
    for name in ("MPLBACKEND", "IN_TEST"): os.environ.pop(name, None)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *(o for o in sys.path if o)])
    CONTEXT.set_forkserver_preload(["warm"])
    try: forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


class Fork:
    "A process forked from the server, with Popen's names"
    def __init__(self,
        what:str|Callable, # "-m", "-c" or a function that can be imported
        *args,             # for -m the module and its arguments, for -c the code and its arguments
        folder:Path,       # where its output is kept
        env:dict,          # its whole environment
        cwd:Path|None=None,# where it works, this process's folder by default
    ):
        stem = folder/f"fork-{next(NUMBER)}"
        self._out, self._err = (stem.with_suffix(o) for o in (".out", ".err"))
        where = str(cwd or Path.cwd())
        self._process = CONTEXT.Process(target=_child, args=(what, args, env, where, str(self._out), str(self._err)))
        self._process.start()
        self.pid = self._process.pid

    @property
    def out(self)->str: return self._out.read_text() if self._out.exists() else ""

    @property
    def err(self)->str: return self._err.read_text() if self._err.exists() else ""

    def poll(self)->int|None: return self._process.exitcode

    def wait(self, timeout:float|None=None)->int|None:
        "Its exit code, -9 after SIGKILL; None if it runs on after so many seconds"
        self._process.join(timeout)
        return self._process.exitcode

    def send_signal(self, number:int)->None:
        if self.poll() is None: os.kill(self.pid, number)

    def kill(self)->None: self.send_signal(signal.SIGKILL)


def _child(what, args, env, cwd, out, err):
    for fd, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY|os.O_CREAT|os.O_APPEND)
        os.dup2(file, fd)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path.insert(0, "")
    random.seed() # of a new process, not the server's
    try:
        if callable(what): return what(*args)
        sys.argv = [what, *map(str, args[1:])]
        if what == "-m":
            sys.modules.pop(args[0], None) # it is __main__, as for python -m
            return runpy.run_module(args[0], run_name="__main__", alter_sys=True)
        exec(compile(args[0], "<string>", "exec"), {"__name__": "__main__"})
    finally: atexit._run_exitfuncs() # which a fork of multiprocessing leaves out: temporary folders


def killed(
    name:str,       # of a function or method, as "srnb.policies.Policy.sample"
    call:int,       # the call, counted from 0, with which the end begins
    after:float=0., # seconds that are left from there
)->None:
    """In a forked process: SIGKILL so many seconds after a function's call, however busy the machine is. The process
    cannot come to its end before: the function does not return from its next call"""
    place, _, name = name.rpartition(".")
    owner, count = pkgutil.resolve_name(place), itertools.count()
    real = getattr(owner, name)

    def die(): os.kill(os.getpid(), signal.SIGKILL)

    def one(*a, **k):
        n = next(count)
        if n == call and not after: die()
        if n == call: threading.Timer(after, die).start()
        if n == call+1:
            while True: time.sleep(1)
        return real(*a, **k)
    setattr(owner, name, one)


def cut(
    name:str,         # as for `killed`
    call:int,
    after:float,
    function:Callable,# what is killed there
    *args,            # its arguments
):
    "What a forked process that dies on the way runs: `forked(cut, 'srnb.training.group_batch', 3, .01, main, [path])`"
    killed(name, call, after)
    return function(*args)


def notebook(
    path:Path,      # of a notebook with a cell of parameters
    out:Path,       # the executed notebook
    parameters:dict,# name -> value
)->None:
    """What a forked process runs to do papermill's work without a kernel's start: every cell, in the folder where it
    was started. What is printed is the process's output, an error its end"""
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from papermill.iorw import load_notebook_node, write_ipynb
    from papermill.parameterize import parameterize_notebook
    write_ipynb(parameterize_notebook(load_notebook_node(str(path)), parameters), str(out))
    nb, shell = read_nb(out), CaptureShell()
    try: shell.run_all(nb, exc_stop=True, verbose=True)
    finally: write_nb(nb, out)

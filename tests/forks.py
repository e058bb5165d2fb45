"""Starts processes quickly: they are forked from one that has already imported torch and computes nothing itself."""

import importlib
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# torch imports the first of these at the first call of a custom operation.
MODULES = ("torch._dynamo", "torch.distributed.checkpoint", "torch.testing", "pytest", "fused_margin")


def run_module(name: str, *arguments: str) -> None:
    """Run a module, as ``python -m name`` does."""
    sys.argv[1:] = arguments
    sys.path.insert(0, os.getcwd())
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def run_command(*arguments: str) -> None:
    """Run the command line, as the program fused-margin does."""
    from fused_margin import cli

    sys.exit(cli.main(arguments))


def serve(descriptor: int) -> None:
    """Fork a process for each request until the other end is closed."""
    connection = Connection(descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the test process handles Ctrl-C
    while True:
        try:
            request, *arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(pickle.dumps(REQUESTS[request](*arguments)))


def fork(job: bytes, output: str, environment: dict[str, str], directory: str) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(output, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(directory)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            function, arguments = pickle.loads(job)
            result = function(*arguments)
            Path(f"{output}.result").write_bytes(pickle.dumps(result))
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:  # noqa: BLE001 - the output has the traceback of any error
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


def poll(pid: int) -> int | None:
    """The exit code of a process that has ended, negative for a signal."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def preload(*modules: str) -> None:
    for module in modules:
        importlib.import_module(module)


REQUESTS = {"fork": fork, "poll": poll, "preload": preload}


@dataclass
class Forked:
    """A forked process, with the interface of `subprocess.Popen`."""

    forks: "Forks"
    pid: int
    path: Path
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.forks.ask("poll", self.pid)
        return self.returncode

    def wait(self, seconds: float = 120) -> int:
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(self.output)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def output(self) -> str:
        """The text of both output streams."""
        return self.path.read_text(encoding="utf-8") if self.path.exists() else ""

    @property
    def result(self) -> Any:
        """The return value of the function."""
        return pickle.loads(Path(f"{self.path}.result").read_bytes())


class Forks:
    """Runs functions in separate processes; functions, arguments and results must be picklable."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        ours, theirs = socket.socketpair()
        with theirs:
            self.server = subprocess.Popen(
                [sys.executable, "-c", f"import forks; forks.serve({theirs.fileno()})"],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                pass_fds=[theirs.fileno()],
            )
        self.connection = Connection(ours.detach())
        self.preload(*MODULES)

    def ask(self, *request: Any) -> Any:
        self.connection.send_bytes(pickle.dumps(request))
        return pickle.loads(self.connection.recv_bytes())

    def preload(self, *modules: str) -> None:
        """Import modules in the process that all later ones are forked from."""
        self.ask("preload", *modules)

    def start(
        self, function: Callable, *arguments: Any, environment: dict[str, str] | None = None, directory: str = ""
    ) -> Forked:
        self.count += 1
        output = self.folder / str(self.count)
        job = pickle.dumps((function, arguments))
        pid = self.ask("fork", job, str(output), {**os.environ, **(environment or {})}, directory or os.getcwd())
        return Forked(self, pid, output)

    def run(self, function: Callable, arguments: Sequence[tuple]) -> list:
        """The results of function(*arguments[k]), run at the same time for all k."""
        started = [self.start(function, *each) for each in arguments]
        for process in started:
            if process.wait() != 0:
                raise RuntimeError(process.output)
        return [process.result for process in started]

    def close(self) -> None:
        self.connection.close()
        self.server.wait(20)

"""A forkserver: a process that has imported the steps' libraries, and forks a child process for each step of a pass.

Importing torch, timm and MLflow takes longer than many steps themselves, and eleven steps would do it eleven times. A
flow keeps one such process running; ``python -m tasks <step>``, which DVC starts, finds it by the environment variable
``UNFREEZE_WARM`` and hands over its arguments, environment and output. Each step is still a separate process: a crash
affects no other step, its memory is freed at its end, and it ends when the process that waits for it ends. Of this
project, only the few modules that the forkserver itself uses are imported before the fork. CUDA is not initialized
before the fork. Libraries that start threads when they are imported (OpenBLAS, Arrow) restart them after the fork.
"""

import contextlib
import ctypes
import importlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from pipeline.process.signals import GRACE

ADDRESS = "UNFREEZE_WARM"
IMPORTS = (
    "torch",
    "torch._dynamo",
    "timm",
    "pandas",
    "sklearn.linear_model",
    "matplotlib.backends.backend_agg",
    "mlflow",
    "mlflow.store.tracking.sqlalchemy_store",
    "cv2",
)
PR_SET_PDEATHSIG = 1
LONGEST = 108
"""Largest length in bytes of a Unix socket's address, including the terminating zero byte."""


@contextlib.contextmanager
def warm_process() -> Iterator[None]:
    """Run the forkserver while the block runs; on Linux only. Nested blocks use the same forkserver."""
    if ADDRESS in os.environ or not sys.platform.startswith("linux"):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="unfreeze-") as folder:
        address = str(Path(folder) / "warm")
        with socket.socket(socket.AF_UNIX) as listener:
            # Listen before the process starts: an early step waits for it, instead of importing everything itself.
            with _short(address) as path:
                listener.bind(path)
            listener.listen()
            number = listener.fileno()
            # The forkserver ends when its standard input is closed: at the end of the block, or of this process.
            command = [sys.executable, "-m", "pipeline.process.forkserver", str(number)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[number])
        os.environ[ADDRESS] = address
        try:
            yield
        finally:
            del os.environ[ADDRESS]
            process.stdin.close()  # type: ignore[union-attr]
            process.wait()


@contextlib.contextmanager
def _short(address: str) -> Iterator[str]:
    """A socket's address; if it is too long (because of `TMPDIR`), an equivalent one through /proc/self/fd."""
    if len(os.fsencode(address)) < LONGEST:
        yield address
        return
    folder = os.open(os.path.dirname(address), os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(address)}"
    finally:
        os.close(folder)


def hand_over(step: str) -> int | None:
    """Have the forkserver run a step; returns the step's exit code, or None if there is no forkserver."""
    with socket.socket(socket.AF_UNIX) as connection:

        def pass_on(number: int, frame: object) -> None:
            connection.shutdown(socket.SHUT_WR)  # the forkserver takes this as a stop request for the step

        # The terminal sends Ctrl-C to the step as well, which ends after a checkpoint.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, pass_on)
        try:
            with _short(os.environ[ADDRESS]) as path:
                connection.connect(path)
            request = json.dumps({"step": step, "folder": os.getcwd(), "environment": dict(os.environ)})
            socket.send_fds(connection, [len(request.encode()).to_bytes(4, "big")], [1, 2])
            connection.sendall(request.encode())
        except (KeyError, OSError):
            return None
        answer = connection.recv(4)
    if not answer:
        return 1  # the forkserver has ended, and the step with it
    code = int.from_bytes(answer, "big", signed=True)
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL always has its default action
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)  # end by the same signal as the step
    return code


def serve(listening: int) -> None:
    """Fork a step for each connection to a listening socket (its descriptor), until standard input is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # steps handle it themselves; this process ends with the flow
    with socket.socket(fileno=listening) as listener, selectors.DefaultSelector() as waiting:
        for module in IMPORTS:
            if select.select([sys.stdin], [], [], 0)[0]:
                return
            importlib.import_module(module)
        waiting.register(sys.stdin, selectors.EVENT_READ, None)
        waiting.register(listener, selectors.EVENT_READ, None)
        while True:
            for key, _ in waiting.select():
                if key.fileobj is sys.stdin:
                    return _stop_all(waiting)
                if key.fileobj is listener:
                    connection = listener.accept()[0]
                    if (pid := _fork(connection)) is not None:
                        ended = os.pidfd_open(pid)
                        waiting.register(connection, selectors.EVENT_READ, (pid, ended, connection))
                        waiting.register(ended, selectors.EVENT_READ, (pid, ended, connection))
                elif key.fd == key.data[1]:
                    _finish(waiting, *key.data)
                elif key.fd in waiting.get_map():  # the waiting process has ended, or requests a stop
                    waiting.unregister(key.fileobj)
                    os.kill(key.data[0], signal.SIGTERM)


def _stop_all(waiting: selectors.BaseSelector) -> None:
    """Ask running steps to stop, and wait for their checkpoints; slower ones are killed when this process ends."""
    steps = {key.data[0]: key.data[1] for key in waiting.get_map().values() if key.data}
    for pid in steps:
        os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + GRACE
    for ended in steps.values():
        select.select([ended], [], [], max(0.0, end - time.monotonic()))


def _finish(waiting: selectors.BaseSelector, pid: int, ended: int, connection: socket.socket) -> None:
    """Send a step's exit code."""
    waiting.unregister(ended)
    os.close(ended)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(KeyError):
        waiting.unregister(connection)
    with contextlib.suppress(OSError), connection:
        connection.sendall(code.to_bytes(4, "big", signed=True))


def _fork(connection: socket.socket) -> int | None:
    """Fork and run the step that the connection asks for; returns its process ID, or None for an invalid request."""
    try:
        size, outputs, _, _ = socket.recv_fds(connection, 4, 2)
        request = json.loads(_receive(connection, int.from_bytes(size, "big")))
    except (OSError, ValueError):
        connection.close()
        return None
    if pid := os.fork():
        for output in outputs:
            os.close(output)
        return pid
    _become(request, outputs)


def _receive(connection: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size and (more := connection.recv(size - len(content))):
        content += more
    return content


def _become(request: dict[str, Any], outputs: list[int]) -> NoReturn:
    """Switch to the working directory, environment and output streams of the step, run it, and exit."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, output in zip((1, 2), outputs, strict=True):
            os.dup2(output, number)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        run(request["step"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(step: str) -> None:
    """Run a step in this process."""
    getattr(importlib.import_module(f"tasks.{step}"), step).main()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
    os._exit(0)  # a regular exit takes seconds to clean up all modules, and the flow would wait

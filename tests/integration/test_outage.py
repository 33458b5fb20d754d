"""Outages of MLflow's server at all kinds of moments and in all ways: afterwards nothing is missing or duplicated."""

import hashlib
import http.client
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.integration.servers import free_port, until

ROOT = Path(__file__).parent.parent.parent
STEP = """
import logging, sys, time
from pipeline.process.environment import set_environment
from pipeline.artifacts import artifact
set_environment()
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
from pipeline.tracking.tracker import Tracker
stage = sys.argv[1]
artifact(stage, "").mkdir(parents=True, exist_ok=True)
params = {"data.source": "photos", "backbone.name": "timm:x", "data.image_size": 32}
tracker = Tracker(stage, params, {"seed": 1})
print("ready", flush=True)
for line in sys.stdin:
    first, last = map(int, line.split())
    for i in range(first, last):
        tracker.curve({"loss": 1 / (i + 1), "rate": float(i)}, i)
    print("noted", flush=True)
artifact(stage, "metrics.json").write_text('{"images": 3}')
artifact(stage, "report.html").write_text(f"<p>{stage}")
start = time.monotonic()
tracker.close("FINISHED", {"accuracy": 0.5, "loss": 9.0}, 1.0)
print(f"closed after {time.monotonic() - start}")
"""
SEND = """
from pipeline.process.environment import set_environment
set_environment()
from pipeline.tracking.journal import waiting
from pipeline.tracking.sender import client, reason, send
for attempt in range(100):
    try:
        for _ in send(client()): pass
    except Exception as error: print(attempt, reason(error))
    if not waiting(): break
"""


@dataclass
class Server:
    """A real MLflow server that can be killed and started again; its data is in a folder."""

    folder: Path
    port: int = field(default_factory=free_port)

    def start(self) -> None:
        store = ("--backend-store-uri", f"sqlite:///{self.folder}/served.db", "--artifacts-destination", "artifacts")
        command = (sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port))
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [*command, *store, "--workers", "1"],
                cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError((self.folder / "log").read_text())

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("served"))
    server.start()
    yield server
    server.kill()


@dataclass
class Proxy:
    """Proxy of the server, with a mode: pass, fail (503), hang, or cut (the response is lost)."""

    port: int
    server: int
    mode: Callable[[str, bytes], str] = lambda path, body: "pass"


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            mode = proxy.mode(self.path, body)
            self.close_connection = mode != "pass"
            if mode == "hang":
                ended.wait(100)
            elif mode == "fail":
                self.send_error(503)
            else:
                ahead = http.client.HTTPConnection("127.0.0.1", proxy.server)
                headers = {key: value for key, value in self.headers.items() if key != "Host"}
                ahead.request(self.command, self.path, body, headers)
                answer = ahead.getresponse()
                content = answer.read()
                if mode == "pass":
                    self.send_response(answer.status)
                    self.send_header("Content-Type", answer.headers.get("Content-Type", ""))
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do

        def log_message(self, format: str, *args: object) -> None: ...

    ended = threading.Event()
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    proxy = Proxy(listening.server_address[1], server.port)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield proxy
    ended.set()
    listening.shutdown()
    listening.server_close()


@dataclass
class Work:
    """A folder in which steps run, and checks of their records in MLflow."""

    folder: Path
    server: Server
    port: int

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "UNFREEZE_"))}
        return kept | {
            "PYTHONPATH": str(ROOT),
            "MLFLOW_TRACKING_URI": f"http://ann:hunter22@127.0.0.1:{self.port}",
            "MLFLOW_EXPERIMENT_NAME": self.folder.name,
            "UNFREEZE_PASS": "pass-1",
        }

    def start(self, *words: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *words], cwd=self.folder, env=self.environment() | more, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *words: str, code: int = 0, **more: str) -> str:
        process = self.start(*words, **more)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == code and "Traceback" not in output and "hunter22" not in output, output
        return output

    def publish(self, code: int = 0) -> str:
        return self.run("-m", "flows.cli", "publish", code=code)

    def check(self, stages: dict[str, int], status: str = "FINISHED") -> None:
        """Check for one parent run, and one child run per step with a report and this many distinct points."""
        client = MlflowClient(f"http://127.0.0.1:{self.server.port}")
        experiment = client.get_experiment_by_name(self.folder.name)
        assert experiment is not None
        found = client.search_runs([experiment.experiment_id])
        [parent] = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
        children = {run.info.run_name: run for run in found if "mlflow.parentRunId" in run.data.tags}
        assert len(found) == 1 + len(stages) and set(children) == set(stages)
        assert parent.info.status == status and parent.data.params["data.image_size"] == "32"
        for stage, points in stages.items():
            child = children[stage]
            assert child.info.status == status and child.data.params == {"seed": "1"}
            for name in ("loss", "rate") if points else ():  # without a curve, there is only the final value
                history = client.get_metric_history(child.info.run_id, name)
                assert sorted(point.step for point in history) == list(range(points))
            if status == "FINISHED":
                assert len(client.get_metric_history(child.info.run_id, "accuracy")) == 1
                assert [f.path for f in client.list_artifacts(child.info.run_id)] == ["report.html"]
                assert len(client.get_metric_history(parent.info.run_id, f"{stage}/images")) == 1
                assert [f.path for f in client.list_artifacts(parent.info.run_id, stage)] == [f"{stage}/report.html"]
        assert not list(self.folder.glob(".unfreeze/tracking/*/*/"))

    def seen(self, points: int) -> bool:
        client = MlflowClient(f"http://127.0.0.1:{self.server.port}")
        experiment = client.get_experiment_by_name(self.folder.name)
        runs = client.search_runs([experiment.experiment_id]) if experiment else []
        return any(run.data.metrics.get("rate") == points - 1 for run in runs)


def say(step: subprocess.Popen[str], text: str, answer: str) -> None:
    assert step.stdin is not None and step.stdout is not None
    if text:
        step.stdin.write(text + "\n")
        step.stdin.flush()
    for line in step.stdout:
        said.append(line)
        if line.strip() == answer:
            return
    raise AssertionError("".join(said))


said: list[str] = []
"""Output of a step, as read so far by `say`."""


def end(step: subprocess.Popen[str]) -> tuple[str, float]:
    """Let a step end; returns all its output, and the seconds that closing its tracker took."""
    rest, _ = step.communicate(timeout=120)
    output = "".join(said) + rest
    said.clear()
    closed = re.search(r"closed after ([\d.]+)", output)
    assert step.returncode == 0 and closed and "Traceback" not in output and "hunter22" not in output, output
    return output, float(closed[1])


SENTENCE = "Continuing without it"


def test_a_server_that_fails_at_the_start_has_everything_when_it_is_back(
    server: Server, proxy: Proxy, tmp_path: Path
) -> None:
    work = Work(tmp_path, server, proxy.port)
    asked: list[str] = []
    proxy.mode = lambda path, body: asked.append(path) or "fail"  # type: ignore[func-returns-value]
    step = work.start("-c", STEP, "ingest")
    say(step, "", "ready")
    say(step, "0 1500", "noted")
    until(lambda: len(asked) > 1)
    proxy.mode = lambda path, body: "pass"
    until(lambda: work.seen(1500))  # automatically, while the step runs
    output, _ = end(step)
    assert output.count(SENTENCE) == 1
    work.check({"ingest": 1500})


def test_a_black_hole_in_the_middle_holds_up_nothing_and_the_next_step_sends_it(
    server: Server, proxy: Proxy, tmp_path: Path
) -> None:
    work = Work(tmp_path, server, proxy.port)
    step = work.start("-c", STEP, "ingest")
    say(step, "", "ready")
    say(step, "0 50", "noted")
    until(lambda: work.seen(50))
    proxy.mode = lambda path, body: "hang"
    say(step, "50 100", "noted")
    output, seconds = end(step)
    assert output.count(SENTENCE) == 1 and seconds < 10
    (tmp_path / "artifacts/ingest/report.html").write_text("of a later pass")
    proxy.mode = lambda path, body: "pass"
    output, _ = end(work.start("-c", STEP, "explore"))
    assert SENTENCE not in output
    work.check({"ingest": 100, "explore": 0})


def test_an_answer_that_is_lost_doubles_nothing(server: Server, proxy: Proxy, tmp_path: Path) -> None:
    work = Work(tmp_path, server, proxy.port)
    seen: set[str] = set()

    def once(path: str, body: bytes) -> str:
        """The server receives every request, but the response to the first attempt is lost."""
        first = (key := hashlib.sha256(path.encode() + body).hexdigest()) not in seen
        seen.add(key)
        return "cut" if first else "pass"

    proxy.mode = once
    step = work.start("-c", STEP, "ingest")
    say(step, "", "ready")
    say(step, "0 1200", "noted")
    output, _ = end(step)
    assert output.count(SENTENCE) == 1
    assert len(work.run("-c", SEND).splitlines()) > 5  # each attempt completes one more request
    work.check({"ingest": 1200})


@pytest.mark.long
def test_server_and_step_are_killed_and_publish_sends_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    server = Server(tmp_path / "served")
    server.start()
    folder = tmp_path / f"work-{server.port}"
    folder.mkdir()
    work = Work(folder, server, server.port)
    step = work.start("-c", STEP, "ingest")
    say(step, "", "ready")
    say(step, "0 50", "noted")
    until(lambda: work.seen(50))
    server.kill()
    say(step, "50 90", "noted")
    step.kill()
    step.communicate()
    said.clear()
    assert "does not answer (connection refused)" in work.publish(code=1)
    server.start()
    try:
        assert "Sent to MLflow" in work.publish()
        assert "Nothing waits" in work.publish()
        work.check({"ingest": 90}, "KILLED")
    finally:
        server.kill()


@pytest.mark.long
def test_a_model_is_registered_once_however_often_it_takes(server: Server, proxy: Proxy, tmp_path: Path) -> None:
    work = Work(tmp_path, server, proxy.port)
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    folder = tmp_path / "artifacts/retrain"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "confusion_matrix.csv").write_text(",a,b\na,1,0\nb,0,1\n")
    proxy.mode = lambda path, body: "fail"
    output = work.run("-m", "tasks", "register", code=1)
    assert "register: MLflow at" in output and "does not answer" in output
    proxy.mode = lambda path, body: "cut" if path.endswith("model-versions/create") else "pass"
    work.run("-m", "tasks", "register", code=1)
    proxy.mode = lambda path, body: "pass"
    output = work.run("-m", "tasks", "register")
    client = MlflowClient(f"http://127.0.0.1:{server.port}")
    [version] = client.search_model_versions("name = 'unfreeze'")
    assert f"run {version.run_id}" in output
    later = {"UNFREEZE_PASS": "pass-2"}  # as after a kill before DVC had recorded the step
    assert f"version 1 registered in MLflow, run {version.run_id}" in work.run("-m", "tasks", "register", **later)
    assert len(client.search_model_versions("name = 'unfreeze'")) == 1
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert "version 2 registered" in work.run("-m", "tasks", "register", **later)
    (folder / "model.safetensors").write_bytes(b"yet others")  # the same pass again: Prefect can repeat a flow run
    assert "version 3 registered" in work.run("-m", "tasks", "register", **later)
    assert len({version.source for version in client.search_model_versions("name = 'unfreeze'")}) == 3
    experiment = client.get_experiment_by_name(tmp_path.name)
    assert experiment is not None
    assert len(client.search_logged_models([experiment.experiment_id])) == 3

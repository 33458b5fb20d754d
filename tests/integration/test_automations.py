"""Prefect's automations on a real server: runs of lost workers are scheduled again, and a local webhook is notified."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from uuid import UUID

import pytest
from prefect import flow
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.events import emit_event
from prefect.exceptions import Abort
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import automations, owner
from tests.integration.project import Project
from tests.integration.servers import free_port, started, until, wait_for

pytestmark = pytest.mark.long

SHORT = timedelta(seconds=12)


@pytest.fixture(scope="module")
def client(
    make_project: Callable[[], Project], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SyncPrefectClient]:
    """Client of a separate server."""
    project, port, log = make_project(), free_port(), tmp_path_factory.mktemp("logs") / "server.log"
    api = f"http://127.0.0.1:{port}/api"
    project.environment["PREFECT_UI_URL"] = f"http://127.0.0.1:{port}"  # used in links
    command = ("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
    with started(project, log, *command), temporary_settings({PREFECT_API_URL: api}):
        wait_for(f"{api}/health", log)
        with get_client(sync_client=True) as found:
            yield found


@pytest.fixture
def begin(client: SyncPrefectClient) -> Callable[..., FlowRun]:
    """Function that creates runs of a deployment, by default with the tag `unfreeze`."""

    @flow(name="recipe")
    def recipe() -> None: ...

    deployment = client.create_deployment(client.create_flow(recipe), f"nightly-{time.time_ns()}")

    def begin(*states: State[None], tags: tuple[str, ...] = ("unfreeze",)) -> FlowRun:
        run = client.create_flow_run_from_deployment(deployment, tags=tags)
        for state in states:
            client.set_flow_run_state(run.id, state)
        return run

    return begin


def state(kind: StateType, name: str | None = None, message: str | None = None) -> State[None]:
    return State(type=kind, name=name, message=message)


def names(client: SyncPrefectClient) -> list[str]:
    return sorted(found.name for found in client.read_automations() if found.name.startswith("unfreeze"))


def test_deploying_again_changes_what_is_there_and_leaves_off_what_is_switched_off(client: SyncPrefectClient) -> None:
    assert automations.main([]) == 0
    [before] = client.read_automations_by_name("unfreeze: worker lost")
    assert before.enabled and before.trigger.within == timedelta(seconds=90)
    client.pause_automation(before.id)
    assert automations.main([]) == 0
    [after] = client.read_automations_by_name("unfreeze: worker lost")
    assert after.id == before.id and not after.enabled
    assert len(names(client)) == 3
    client.resume_automation(before.id)


def test_a_block_that_is_not_there_is_refused_in_a_sentence(
    client: SyncPrefectClient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert automations.main(["--notify", "slack-webhook/nobody"]) == 2
    assert "there is no block slack-webhook/nobody" in capsys.readouterr().err


def test_a_run_whose_worker_is_silent_is_scheduled_again_and_no_other(
    client: SyncPrefectClient, begin: Callable[..., FlowRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automations, "SILENCE", SHORT)
    monkeypatch.setattr(automations, "STARTING", SHORT)
    automations.main([])
    pending, running = state(StateType.PENDING), state(StateType.RUNNING)
    lost, never_started, alive = begin(pending, running), begin(pending), begin(pending, running)
    done = begin(pending, running, state(StateType.COMPLETED))
    foreign = begin(pending, running, tags=())

    def heartbeat(run: FlowRun) -> None:
        emit_event(
            "prefect.flow-run.heartbeat",
            {"prefect.resource.id": f"prefect.flow-run.{run.id}"},
            related=[{"prefect.resource.id": "prefect.tag.unfreeze", "prefect.resource.role": "tag"}],
        )

    def now(run: FlowRun) -> tuple[str | None, StateType | None]:
        found = client.read_flow_run(run.id).state
        return (found.name, found.type) if found else (None, None)

    heartbeat(lost)
    heartbeat(done)  # a heartbeat that arrives late
    taken = {lost.id: False, never_started.id: False}
    end = time.monotonic() + 60
    while not all(taken.values()) and time.monotonic() < end:
        heartbeat(alive)
        for run in (lost, never_started):
            taken[run.id] = now(run) == ("AwaitingRetry", StateType.SCHEDULED)
        time.sleep(3)
    assert all(taken.values())
    assert now(alive)[1] == now(foreign)[1] == StateType.RUNNING
    assert now(done)[1] == StateType.COMPLETED
    states = [found.name for found in client.read_flow_run_states(lost.id)]
    assert states == ["Scheduled", "Pending", "Running", automations.LOST, "AwaitingRetry"]

    # The same run is executed again. The first worker, which was only disconnected, notices this.
    monkeypatch.setattr(owner, "_owned", (lost.id, 1))
    with pytest.raises(Abort):
        owner.stop_if_taken()
    monkeypatch.setattr(owner, "_owned", (alive.id, 1))
    owner.stop_if_taken()
    for again in (pending, running):
        client.set_flow_run_state(lost.id, again)
    found = client.read_flow_run(lost.id)
    assert (found.run_count, found.state_type) == (2, StateType.RUNNING)
    monkeypatch.setattr(owner, "_owned", (lost.id, 1))
    assert owner.is_taken()
    monkeypatch.setattr(owner, "_owned", (lost.id, 2))
    assert not owner.is_taken() and owner.is_another_attempt()


def test_a_webhook_is_told_of_failures_lost_workers_and_better_models(
    client: SyncPrefectClient, begin: Callable[..., FlowRun], tmp_path: Path
) -> None:
    told: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *words: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Webhook(url=f"http://127.0.0.1:{server.server_port}/").save("team", overwrite=True)
        try:
            assert automations.main(["--notify", "webhook/team"]) == 0
            assert len(names(client)) == 6
            pending, running = state(StateType.PENDING), state(StateType.RUNNING)
            begin(pending, running, state(StateType.FAILED, message='The step "ingest" failed:\nno images'))
            begin(pending, running, state(StateType.CRASHED, automations.LOST, "No heartbeat"))
            begin(pending, running, state(StateType.COMPLETED))
            begin(pending, running, state(StateType.FAILED), tags=())
            emit_event(
                automations.COMPARED, {"prefect.resource.id": "unfreeze.model.photos"}, payload={"text": "Better."}
            )
            until(lambda: len(told) >= 3)
            time.sleep(2)
        finally:
            server.shutdown()
    assert len(told) == 3
    failed, lost, better = sorted(told, key=lambda text: ("failed" not in text, "lost" not in text))
    assert failed.startswith("unfreeze: failed: ") and 'The step "ingest" failed:\nno images' in failed
    assert "/runs/flow-run/" in failed and UUID(failed.rpartition("/")[2])
    assert lost.startswith("unfreeze: worker lost: ") and "No heartbeat" in lost
    assert better == "unfreeze: better or not: Better."

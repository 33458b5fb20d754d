"""Automations on Prefect's server: reschedule a run whose worker is lost, and send notifications.

`make deploy` runs this file; run again, it updates the existing automations. A flow run sends a heartbeat every 30
seconds (`PREFECT_FLOWS_HEARTBEAT_FREQUENCY` in `prefect.yaml`, the shortest interval that Prefect accepts).
"""

import argparse
import sys
from collections.abc import Iterable
from datetime import timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import CallWebhook, ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound

SILENCE = timedelta(seconds=90)
"""Time without a heartbeat after which the worker of a run is considered lost."""
STARTING = timedelta(minutes=10)
"""Time that a worker has between taking a run and starting it; it may have to install an environment first."""
LOST = "WorkerLost"
"""Name of the short-lived state of a run whose worker is lost, before it is scheduled again."""
Match = dict[str, str | list[str]]
RUNS: Match = {"prefect.resource.id": "prefect.flow-run.*"}
OURS: Match = {"prefect.resource.role": "tag", "prefect.resource.id": "prefect.tag.unfreeze"}
"""Tag of deployments and of their runs; other runs have no worker that could be lost."""

COMPARED = "unfreeze.model"
"""Event of a deployment's run that has registered a model, with a comparison to the previous version."""
# Prefect fills in the URL of its UI if PREFECT_UI_URL is set for the server.
STATE = "{{ flow_run.name }}: {{ flow_run.state.message }} {{ flow_run|ui_url or '' }}"


def events(*names: str) -> set[str]:
    """Events of a flow run, by the names of its states."""
    return {f"prefect.flow-run.{name}" for name in names}


def silent(after: set[str], within: timedelta) -> EventTrigger:
    """Trigger: after one of these events of a run, no further event of the run in this time."""
    return EventTrigger(
        match=RUNS, match_related=OURS, after=after, expect=events("*"), for_each={"prefect.resource.id"},
        posture=Posture.Proactive, threshold=1, within=within,
    )  # fmt: skip


def heard(match: Match, related: Match, expected: set[str]) -> EventTrigger:
    """Trigger: any of these events of a matched resource."""
    return EventTrigger(match=match, match_related=related, expect=expected, posture=Posture.Reactive, threshold=1)


def takeovers() -> list[AutomationCore]:
    """Automations that schedule the same run again if its worker is lost, so that another worker continues it.

    The state becomes `LOST`, of type CRASHED, and then SCHEDULED. The intermediate state protects runs that have
    ended: their last heartbeat may arrive late, for example from a machine whose clock is ahead, and trigger the
    automation. Prefect does not set a run that has ended to CRASHED, so it is not scheduled again.
    """

    def crash(message: str) -> ChangeFlowRunState:
        return ChangeFlowRunState(name=LOST, state=StateType.CRASHED, message=message, force=False)

    return [
        AutomationCore(
            name="unfreeze: worker lost",
            description="A run has sent no heartbeat for a while.",
            trigger=silent(events("heartbeat", "Running"), SILENCE),
            actions=[crash("No heartbeat: the worker is lost; another one continues the run.")],
        ),
        AutomationCore(
            name="unfreeze: worker lost before the start",
            description="A worker took a run but did not start it.",
            trigger=silent(events("Pending", "Submitting", "InfrastructurePending"), STARTING),
            actions=[crash("Taken but not started: the worker is lost; another one starts the run.")],
        ),
        AutomationCore(
            name="unfreeze: another worker",
            description="Another worker continues a run whose worker is lost.",
            trigger=heard(RUNS, OURS, events(LOST)),
            actions=[
                ChangeFlowRunState(
                    name="AwaitingRetry", state=StateType.SCHEDULED, message="For another worker.", force=False
                )
            ],
        ),
    ]


def notifications(block: UUID, kind: str) -> list[AutomationCore]:
    """Automations that notify people of failures, lost workers and model comparisons.

    Args:
        block: id of the Prefect block that sends the notifications.
        kind: its type; ``webhook`` gets JSON with the key ``text``, which Slack and Mattermost take as it is.
    """

    def tell(subject: str, body: str) -> SendNotification | CallWebhook:
        if kind == "webhook":
            text = f"{{% filter tojson %}}{subject}: {body}{{% endfilter %}}"
            return CallWebhook(block_document_id=block, payload=f'{{"text": {text}}}')
        return SendNotification(block_document_id=block, subject=subject, body=body)

    told: tuple[tuple[str, Match, Match, set[str], str], ...] = (
        ("failed", RUNS, OURS, events("Failed", "Crashed", "TimedOut"), STATE),
        ("worker lost", RUNS, OURS, events(LOST), STATE),
        ("better or not", {"prefect.resource.id": f"{COMPARED}.*"}, {}, {COMPARED}, "{{ event.payload.text }}"),
    )
    return [
        AutomationCore(
            name=f"unfreeze: tell: {what}",
            trigger=heard(match, related, expected),
            actions=[tell(f"unfreeze: {what}", body)],
        )
        for what, match, related, expected, body in told
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Create or update the automations; returns the exit code: 2 if the block does not exist."""
    parser = argparse.ArgumentParser(prog="python -m flows.automations", description=__doc__)
    parser.add_argument(
        "--notify", metavar="TYPE/NAME",
        help="send notifications through this block, for example slack-webhook/team; `prefect block ls` lists yours. "
        "Without it, notifications stay as they are.",
    )  # fmt: skip
    chosen = parser.parse_args(arguments)
    with get_client(sync_client=True) as client:
        automations = takeovers()
        if chosen.notify:
            kind, _, name = chosen.notify.partition("/")
            try:
                block = client.read_block_document_by_name(name, kind)
            except ObjectNotFound:
                print(
                    f"unfreeze: there is no block {chosen.notify}. Create one on Prefect's page Blocks; "
                    "`prefect block ls` lists the existing ones.",
                    file=sys.stderr,
                )
                return 2
            automations += notifications(block.id, kind)
        put(client, automations)
    return 0


def put(client: SyncPrefectClient, automations: Iterable[AutomationCore]) -> None:
    """Create automations, or update those of the same name; a disabled one stays disabled."""
    for automation in automations:
        found = client.read_automations_by_name(automation.name)
        if found:
            automation.enabled = found[0].enabled
            client.update_automation(found[0].id, automation)
        else:
            client.create_automation(automation)
        print(f"Automation: {automation.name}")


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `unfreeze run`, `unfreeze check`, `unfreeze predict`, `unfreeze report`, `unfreeze sweep`,
`unfreeze reproduce`, `unfreeze publish`."""

import argparse
import gc
import os
import select
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

from pipeline.artifacts import STAGES
from pipeline.process.secrets import mask
from unfreeze.errors import UserError, disk_trouble

UNREAD = 128 + signal.SIGPIPE
"""Exit code if the reader of the output has ended (SIGPIPE), as in shells."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code.

    It is 0 for success, 2 for a user error, 130 for an interruption, 141 for a broken pipe, and 1 for other failures: a
    failed step, an unreadable image, weights that differ from the reproduced run's, or results that were not sent.
    """
    from pipeline.process.environment import set_environment, start_in_utf8

    if arguments is None:
        start_in_utf8()
        # Importing torch and timm creates half a million objects, which the collector would traverse again and again.
        gc.set_threshold(50_000)
    set_environment()
    chosen = _parser().parse_args(arguments)
    try:
        code = int(chosen.command(chosen))
        print(end="", flush=True)
        if arguments is None and chosen.command in (_check, _predict):
            sys.stderr.flush()
            os._exit(code)  # a regular exit takes seconds to clean up torch's modules
        return code
    except UserError as error:
        sentence = str(error)
    except BrokenPipeError:
        if not _is_unread():
            raise
        return UNREAD
    except OSError as error:
        if not (sentence := disk_trouble(error)):
            raise
    print(f"unfreeze: {mask(sentence)}", file=sys.stderr)
    return 2


def _is_unread() -> bool:
    """Whether the reader of standard output has ended, as after ``| head``; further output is discarded then."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="unfreeze", description="Easy steps to a world-class image classifier.")
    commands = parser.add_subparsers(required=True, metavar="command")

    run = commands.add_parser(
        "run", help="run the recipe, after writing any changes into params.yaml; unchanged steps are not run again"
    )
    check = commands.add_parser(
        "check", help="check settings and the source of images; runs nothing, and does not change params.yaml"
    )
    run.add_argument(
        "--until", metavar="STEP", choices=STAGES, default="register", help="stop after this step (default: the last)"
    )
    for command, does in ((run, _run), (check, _check)):
        command.add_argument(
            "--settings", type=Path, metavar="FILE",
            help="override params.yaml by the values in FILE, for example settings/photographs.yaml",
        )  # fmt: skip
        command.add_argument(
            "-S", "--set-param", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
            help="override a value of params.yaml, as in `dvc exp run -S`; may be repeated",
        )  # fmt: skip
        command.set_defaults(command=does)

    predict = commands.add_parser("predict", help="classify images with the trained model")
    predict.add_argument("images", nargs="+", type=Path, help="files, or folders of images")
    predict.add_argument(
        "--model", type=Path, default=Path("artifacts/retrain/model.safetensors"),
        help="weights to use (default: %(default)s)",
    )  # fmt: skip
    predict.add_argument(
        "--tta", action="store_true", help="average over augmented views of each image: slower, often better"
    )
    predict.add_argument("--csv", action="store_true", help="print CSV with every class's probability")
    predict.set_defaults(command=_predict)

    report = commands.add_parser("report", help="print the accuracies and where the reports are")
    report.set_defaults(command=_report)

    sweep = commands.add_parser(
        "sweep", help="search over settings: every trial is a run of the recipe, rated on validation images"
    )
    sweep.add_argument(
        "file", nargs="?", type=Path, default=Path("sweep.yaml"), help="search space (default: %(default)s)"
    )
    sweep.set_defaults(command=_sweep)

    reproduce = commands.add_parser(
        "reproduce", help="reproduce the model of an earlier run in a worktree beside this folder, and compare it"
    )
    reproduce.add_argument("run", help="id of an MLflow run, or models:/<name>/<version>")
    reproduce.add_argument("--into", type=Path, metavar="FOLDER", help="worktree (default: beside this folder)")
    reproduce.set_defaults(command=_reproduce)

    publish = commands.add_parser(
        "publish", help="send queued results to MLflow and DVC's remote; the next run does so too"
    )
    publish.add_argument(
        "--anyway", action="store_true",
        help="also send results that were queued for another tracking server than the current MLFLOW_TRACKING_URI",
    )  # fmt: skip
    publish.set_defaults(command=_publish)
    return parser


def _run(chosen: argparse.Namespace) -> int:
    from pipeline.process.lock import alone
    from pipeline.process.orphans import leave_none
    from pipeline.process.signals import INTERRUPTED, interrupt_in_time

    try:
        _check_code()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, interrupt_in_time)
        leave_none()
        with alone("run"):
            return _run_alone(chosen)
    except KeyboardInterrupt:
        print("unfreeze: stopped. `unfreeze run` continues where it stopped.", file=sys.stderr)
        return INTERRUPTED


def _check_code() -> None:
    """Raises UserError if this folder is a copy of the project, but its environment is that of the original."""
    here, this = Path("flows/cli.py"), Path(__file__)
    if here.exists() and not here.samefile(this):
        raise UserError(
            f"`unfreeze` runs the code in {this.parent.parent}, but {Path.cwd()} has its own code. Set up an "
            "environment here: `make setup; . .venv/bin/activate`."
        )


def _run_alone(chosen: argparse.Namespace) -> int:
    from flows.checks import check_for, check_images
    from pipeline.process.lock import alone
    from pipeline.process.signals import GRACE
    from unfreeze.settings.overrides import with_overrides
    from unfreeze.settings.schema import load_settings, parse_text, read_text

    overrides = _overrides(chosen)
    text = with_overrides("params.yaml", overrides) if overrides else ""
    changes = bool(overrides) and text != read_text("params.yaml")
    if changes:
        with alone("step", GRACE):  # wait: a step of `dvc repro` may hold the lock
            check_for(overrides)(parse_text(text))
    else:
        check_images(load_settings())
    _check_surroundings()

    from flows.passes import NOTHING, up_to_date
    from flows.prefect_server import go_on_without, has_server, is_away, prefect_server
    from flows.publish import what_waits
    from flows.recipe import recipe
    from flows.stage import StageFailed
    from flows.summary import print_steps, print_summary
    from pipeline.process.forkserver import warm_process

    try:
        outcomes = {} if changes or has_server() else up_to_date(chosen.until)
        if outcomes:
            print(NOTHING % len(outcomes))
        else:
            # Beside a temporary server, which takes seconds to start. Otherwise, the recipe starts it if a step is stale.
            with nullcontext() if has_server() else warm_process(), prefect_server():
                outcomes = recipe(overrides, until=chosen.until)
        if chosen.until == "register":
            print_summary(outcomes)
        else:
            print_steps(outcomes)
    except StageFailed as error:
        print(f"unfreeze: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if not is_away(error):
            raise
        go_on_without(overrides, chosen.until)
    finally:
        if left := what_waits():
            print(left, file=sys.stderr)
    return 0


def _check_surroundings() -> None:
    """Check the addresses of MLflow and Prefect in the environment. Raises UserError."""
    from flows.prefect_server import check_api
    from pipeline.tracking.local_store import check_tracking_uri

    check_tracking_uri()
    check_api()


def _overrides(chosen: argparse.Namespace) -> list[str]:
    """The values to change in params.yaml: the file of `--settings`, then `-S`, which overrides the file."""
    from unfreeze.settings.overrides import read_overrides

    return (read_overrides(chosen.settings) if chosen.settings else []) + chosen.overrides


def _check(chosen: argparse.Namespace) -> int:
    from flows.checks import check_all, look_at_some
    from unfreeze.settings.overrides import with_overrides
    from unfreeze.settings.schema import load_settings, parse_text

    _check_code()
    overrides = _overrides(chosen)
    settings = parse_text(with_overrides("params.yaml", overrides)) if overrides else load_settings()
    table = check_all(settings)
    _check_surroundings()
    print(
        f"params.yaml{' with these changes' if overrides else ''} is right; {len(table)} images in {settings.data.source}:"
    )
    for label, count in table["label"].value_counts().sort_index().items():
        print(f"  {count:7,d}  {label}")
    looked_at, unreadable = look_at_some(table, settings.data)
    if unreadable:
        print(f"Of {looked_at} images that were looked at, {len(unreadable)} cannot be read, and would be set aside:")
        print("  " + "\n  ".join(unreadable))
    for note in table.attrs["notes"]:
        print(f"- {note}")
    return 0


def _predict(chosen: argparse.Namespace) -> int:
    files = _image_files(chosen.images)
    from unfreeze.data.folders import shown
    from unfreeze.evaluation.predictor import Predictor

    table = Predictor(chosen.model).predict(files, chosen.tta)
    table.insert(0, "path", [shown(str(file)) for file in files])
    if chosen.csv:
        print(table.to_csv(index=False), end="")
    else:
        surest = table.filter(regex="^p_").max(axis=1)
        for path, predicted, probability, reason in zip(
            table["path"], table["predicted"], surest, table["reason"], strict=True
        ):
            print(f"{path}: " + (f"not read: {reason}" if reason else f"{predicted} {probability:.1%}"))
    return 0 if table["reason"].eq("").all() else 1


def _image_files(named: list[Path]) -> list[Path]:
    """The given files, and the files in the given folders."""
    from unfreeze.data.folders import walk

    files: list[Path] = []
    for path in named:
        if not os.path.exists(path):  # also False for a name that is too long
            raise UserError(f"{path} does not exist.")
        files += [Path(file) for file in walk(str(path))] if os.path.isdir(path) else [path]
    if not files:
        raise UserError(f"There are no images in {', '.join(map(str, named))}.")
    return files


def _report(chosen: argparse.Namespace) -> int:
    from flows.summary import print_summary
    from pipeline.artifacts import artifact

    missing = [stage for stage in STAGES if not artifact(stage, "metrics.json").exists()]
    if missing:
        raise UserError(
            f"There is no finished run here: {', '.join(missing)} did not run yet. Start with `unfreeze run`."
        )
    print_summary({})
    return 0


def _sweep(chosen: argparse.Namespace) -> int:
    from flows.sweep import sweep
    from pipeline.process.lock import alone
    from pipeline.process.signals import INTERRUPTED, interrupt_in_time

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, interrupt_in_time)
        with alone("sweep"):
            return sweep(chosen.file)
    except KeyboardInterrupt:
        print("unfreeze: stopped. `unfreeze sweep` continues where it stopped.", file=sys.stderr)
        return INTERRUPTED


def _reproduce(chosen: argparse.Namespace) -> int:
    from flows.reproduce import reproduce
    from pipeline.tracking.sender import Unreachable

    try:
        return reproduce(chosen.run, chosen.into)
    except Unreachable as error:
        raise UserError(str(error)) from None


def _publish(chosen: argparse.Namespace) -> int:
    from flows.publish import publish

    return publish(chosen.anyway)


if __name__ == "__main__":
    sys.exit(main())

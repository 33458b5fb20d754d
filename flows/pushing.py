"""Push a step's results to DVC's remote while the next step runs.

If the worker is lost, another one pulls these results instead of computing them again.
"""

from concurrent.futures import Future, ThreadPoolExecutor

from flows import dvc
from pipeline.mirror import forget


class Pushing:
    """Background pushes, one at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "push")
        self._last: Future[str | None] | None = None
        self._done: set[str] = set()

    def after(self, stage: str) -> None:
        """Queue a push of a step's results, unless a push is queued that has not started: it includes them."""
        self._done.add(stage)
        if self._last is None or self._last.running() or self._last.done():
            self._last = self._thread.submit(self._push)

    def wait(self) -> bool:
        """Wait for the last push; returns whether everything is in the remote."""
        self._thread.shutdown()
        return self._last is not None and self._last.exception() is None and self._last.result() is None

    def _push(self) -> str | None:
        done = set(self._done)
        trouble = dvc.push(pauses=(), beside=True)
        if trouble is None:
            forget(done)  # other machines no longer need their checkpoints
        return trouble

"""Processes: their environment, signals, locks, GPUs and secrets, Git, the forkserver, and the watcher of orphans.

It may import `unfreeze.errors` and `unfreeze.persistence`, and nothing else of the project; all of `pipeline`, `tasks`
and `flows` may import it.
"""

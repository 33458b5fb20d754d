"""A team's servers: `local_team` starts all of them on one machine for a trial, the other files are for production.

It may import `pipeline.process` and `unfreeze.errors`; only tests import it.
"""

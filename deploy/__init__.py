"""Servers of a team.

The Python modules start all of them on one machine for a trial; the other files are for production.

This package may import `pipeline.process` and `unfreeze.errors`. Only tests import this package.
"""

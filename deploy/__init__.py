"""A team's servers: `local_team` starts all of them on one machine for trying, the other files set them up on real ones.

It may import `pipeline.process` and `unfreeze.errors`; nothing imports it but tests.
"""

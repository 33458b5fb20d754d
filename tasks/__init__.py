"""The steps of the recipe, one file each, and nothing else; `pipeline.step` says what makes a function a step.

They may import everything but `flows`. DVC starts them with ``python -m tasks <step>``, for which
`pipeline.process.forkserver` imports a step by its name; nothing else imports them.
"""

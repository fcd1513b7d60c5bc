"""What every method of a verb promises, run on every method of the catalogue: one file a verb.

A method joins by its entry in the catalogue, with `EXAMPLE` (settings that take a second) and, where it has one,
`NEUTRAL` (settings that change nothing) on its class; a family of pipelines joins by a line in `families.py`.
"""

"""The commands of `spade-t5`, one module each: `add_arguments(parser)` and `run(arguments)`, which may return an exit code.

One that hands the rest of its words on to a parser of its own says so by `HANDS_ON_WORDS = True`.
"""

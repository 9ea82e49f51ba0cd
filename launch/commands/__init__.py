"""The commands of `spade-t5`, one module each: `add_arguments(parser)` and `run(arguments)`."""

"""The ``pykvm`` command: one module a command, each a thin caller of the rooms below."""

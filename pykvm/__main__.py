"""``python -m pykvm``: the command line without the installed script."""

from pykvm.cli.main import main

main()

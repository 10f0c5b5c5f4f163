"""The command line's verbs, one file each; :mod:`mendfast.cli` reads the arguments."""

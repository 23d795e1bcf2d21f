"""The commands of ``python -m ffnet``, one module each.

A module has ``add_parser(commands)``, which adds the command's parser to argparse's subparsers with ``run`` as its
default, and ``run(options)``, which returns the exit status. Imports that only one command needs are in its ``run``, so
that other commands neither wait for them nor need them installed. Errors that the user can fix are raised as
`CommandError`.
"""

"""The commands of ``python -m ffnet``, a module each.

A module has ``add_parser(commands)``, which adds the command's parser to argparse's subparsers with ``run`` as its
default, and ``run(options)``, which returns the exit status. It imports what only it needs in ``run``, so that other
commands neither wait for it nor need it installed. What the user can put right is raised as `CommandError`.
"""

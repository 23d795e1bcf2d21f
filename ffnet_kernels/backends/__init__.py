"""How operators run, one module a backend.

A backend is a module with, besides a function for each operator it knows (same arguments as the schema; the reference
runs the others):

``unavailable() -> str | None``
    why it cannot run at all on this machine, or None;
``refusal(operator, args) -> str | None``
    why it does not take this call, or None. The chooser reads it quietly, a forced backend raises it;
``slower(operator, args) -> str | None``
    why plain PyTorch was measured to be faster at this call, or None; only the chooser asks;
``describe(operator, args) -> str``
    which variant it would run, for ``explain``.
"""

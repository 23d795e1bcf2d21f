"""The native libraries and how they were built; csrc/build.py writes them here."""

"""fastfocal inside detectors that people train: one file per host, each importing its host alone.

Nothing is patched on import. Every swap is a function that the user calls, can be undone, and names what it is equal to.
"""

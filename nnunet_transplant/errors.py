"""The one exception this package raises for input a user can mend."""


class TransplantError(ValueError):
    """What is wrong and where, in words a user of nnU-Net understands. The commands print it and exit with 1."""

"""The version of Colonnade, which the wheel has, too."""

__version__ = "0.1.0"

"""The version, for all who compare or report it."""

__version__ = "0.1.0"

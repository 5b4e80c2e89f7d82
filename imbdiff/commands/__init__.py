"""The commands of `imbdiff`, one a file: a frozen dataclass that is its command line, and what it does."""

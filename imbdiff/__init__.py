"""imbdiff: diffusion models on long-tailed data, and the fused operations that train them.

`from imbdiff import ops` gives the differentiable operations; the command `imbdiff` gives the trainer.
Importing this package imports torch and nothing else that is heavy.
"""

__version__ = "0.1.0"

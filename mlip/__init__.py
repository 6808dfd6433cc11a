"""MLIP: an open implementation of medical language-image pre-training (arXiv 2402.02045).

Nothing is re-exported here: import from the module that owns the thing, for example
``from mlip.kernels.info_nce import info_nce_loss``.
"""

__version__ = "0.1.0"

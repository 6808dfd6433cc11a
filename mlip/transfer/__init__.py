"""What a checkpoint is worth: one task, one file.

evaluation.py runs the tasks that train nothing, protocol.py those that train something on the image
encoder.

The public entry is imported late, so that a metric can be used without the data loader.
"""

from __future__ import annotations

from typing import Any

TASKS = (
    *("zero_shot", "retrieval", "grounding"),
    *("classification", "segmentation", "detection"),
)


def evaluate_run(*arguments: Any, **named: Any) -> dict[str, Any]:
    """mlip.transfer.evaluation.evaluate_run."""
    from mlip.transfer.evaluation import evaluate_run as run

    return run(*arguments, **named)


def save_results(results: Any, path: Any) -> Any:
    """mlip.transfer.evaluation.save_results."""
    from mlip.transfer.evaluation import save_results as save

    return save(results, path)

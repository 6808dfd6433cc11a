"""From rows to batches of pixels: order, samples, DALI's pipeline and torch's."""

"""One step, the engines that make it, and the loop, checkpoints and log around it."""

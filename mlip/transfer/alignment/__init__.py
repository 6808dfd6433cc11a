"""What the two towers know together, nothing trained: zero-shot, retrieval, grounding."""

"""What an image encoder is worth as a start: tasks that fit a head or the whole."""

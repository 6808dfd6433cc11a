"""What is true of an image, and where it is written: labels, boxes, masks, generated studies."""

"""What a checkpoint is worth: one task, one file.

evaluation.py runs the tasks that train nothing, protocol.py those that train something on the image
encoder.
"""

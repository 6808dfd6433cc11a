"""What a checkpoint is worth: one task, one file.

truth/      what is right; knows no score
measures/   how right an output is, and how sure that is; knows no task
alignment/  tasks that train nothing (alignment/evaluation.py runs them)
fits/       tasks that train something on the image encoder (fits/protocol.py runs them)
films/      commands on films that nobody labelled
"""

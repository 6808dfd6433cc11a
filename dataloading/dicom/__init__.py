"""DICOM radiographs in and out; radiograph.py is the door."""

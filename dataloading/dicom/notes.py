"""What the codes mean that mark a film as odd but read; docs/dicom.md says more of each."""

from __future__ import annotations

NOTES = {
    "unusable_window": "the window is no number, has no width or shows nothing of the film",
    "unusable_voi_lut": "the VOI LUT shows nothing of the film",
    "own_range": "no VOI LUT and no usable window: the film's own extremes are black and white",
    "first_of_several_windows": "several windows: the first is used",
    "first_of_several_voi_luts": "several VOI LUTs: the first is used",
    "first_of_several_modality_luts": "several modality LUTs: the first is used",
    "unusable_padding": "PixelPaddingValue lies among the film's own values: it is shown as one",
    "unknown_voi_function": "VOILUTFunction is another word than the three: taken as LINEAR",
    "bits_over_stored": "bits above BitsStored are set and left out: the film may be garbled",
    "unsure_polarity": "PresentationLUTShape contradicts the photometric interpretation: the film "
    "may be inverted",
    "mirrored": "by PatientOrientation left and right are exchanged; the film is not flipped",
    "several_views": "ViewPosition has several values: all are kept",
    "upside_down": "by PatientOrientation the film is upside down; it is not turned",
    "on_its_side": "by PatientOrientation the film lies on its side; it is not turned",
    "unread_sex": "PatientSex is an unknown word: not stated",
    "unread_age": "neither PatientAge nor the dates tell an age of 0 to 120 years: not stated",
}

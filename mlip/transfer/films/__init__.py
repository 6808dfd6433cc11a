"""Commands on films that nobody labelled: embed, search, classify, outliers, ground."""

"""Commands on a user's own films, which nobody labelled: embed, classify, outliers, ground."""

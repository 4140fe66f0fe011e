"""A page on this machine that browses the captions of a dataset: search, filters, images."""

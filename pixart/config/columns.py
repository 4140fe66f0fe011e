"""Configuration of the columns of a source: where its images, captions and labels are."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnsConfig:
    """Names of columns of a parquet source, of metadata files, or of keys of JSON files; none tries common names."""

    image: str | None = None
    """Column of the images: binary, a struct of `bytes` and `path`, or paths; none tries image, jpg and others."""

    caption: str | None = None
    """Column of the captions; none takes the first of text, caption and others that is not empty."""

    label: str | None = None
    """Column of the class: integers, or words that are numbered in alphabetical order; none tries label and others."""

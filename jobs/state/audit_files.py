"""Where an audit's files lie in a dataset."""

FOLDER = "audit"
SUMMARY, PAGE, DUPLICATES = "audit.json", "audit.html", "duplicates.parquet"

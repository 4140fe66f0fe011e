"""Names of the audit's folder and files in a dataset."""

FOLDER = "audit"
SUMMARY, PAGE, DUPLICATES = "audit.json", "audit.html", "duplicates.parquet"

"""Prints the figures of the attack by area."""

from tests.attack.campaign import PROPERTY

COLUMNS = ("tries", "refused", "tracebacks", "hangs", "wrong", "seconds")


def pytest_terminal_summary(terminalreporter) -> None:
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    figures = [value for report in reports for name, value in report.user_properties if name == PROPERTY]
    if not figures:
        return
    total = {"area": "all", **{column: sum(entry[column] for entry in figures) for column in COLUMNS}}
    lines = [f"{'area':<28}" + "".join(f"{column:>12}" for column in COLUMNS)]
    for entry in (*sorted(figures, key=lambda entry: entry["area"]), total):
        lines.append(f"{entry['area']:<28}" + "".join(f"{entry[column]:>12,.0f}" for column in COLUMNS))
    terminalreporter.section("attack: figures by area")
    terminalreporter.write("\n".join(lines) + "\n")

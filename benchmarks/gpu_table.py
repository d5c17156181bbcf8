"""The table of `benchmarks.multi_gpu`: its columns, and the figures that compare two of its rows."""

from benchmarks.gpu_jobs import Row

COLUMNS = "{:<9} {:<17} {:<48} {:>9} {:>9} {:>6} {:>9} {:>8}  {}"
HEADINGS = ("part", "model", "", "tokens/s", "per GPU", "MFU", "peak GiB", "ours is", "")
WANTED = 1.05  # times as fast as each peer


def with_ratios(rows: list[Row]) -> list[Row]:
    """Return the rows with our speed relative to each peer's, and with the efficiency of weak scaling."""
    measured = [row for row in rows if "tokens_per_second" in row]
    speeds = {(row["part"], row["model"], row["name"]): row["tokens_per_second"] for row in measured}
    alone = {row["model"]: row["per_gpu"] for row in measured if row["part"] == "weak" and row["name"] == "alone"}
    found = []
    for row in rows:
        ours = speeds.get((row["part"], row.get("model"), row.get("beside")))
        if "tokens_per_second" in row and ours and row["name"] != row["beside"] and row["part"] == "speed":
            row = row | dict(ours_is=ours / row["tokens_per_second"])
        if row["part"] == "weak" and row["name"] != "alone" and "per_gpu" in row and row["model"] in alone:
            efficiency = row["per_gpu"] / alone[row["model"]]
            row = row | dict(efficiency=efficiency, note=f"{efficiency:.1%} of what each does alone; {row['note']}")
        found.append(row)
    return found


def line(row: Row) -> str:
    """Return a row as a line of the table."""

    def number(key: str, form: str) -> str:
        return form.format(row[key]) if row.get(key) is not None else ""

    return COLUMNS.format(
        row["part"],
        row.get("model", ""),
        row["name"][:48],
        number("tokens_per_second", "{:.0f}"),
        number("per_gpu", "{:.0f}"),
        number("mfu", "{:.1%}"),
        number("peak_gib", "{:.1f}") if row.get("peak_gib") else "",
        number("ours_is", "{:.2f}x"),
        row["note"],
    ).rstrip()


def summary(rows: list[Row]) -> list[str]:
    """Return lines that name our fastest layout for each model, each comparison that is too close, and the failures."""
    found = []
    for model in dict.fromkeys(row["model"] for row in rows if row["part"] == "speed" and "per_gpu" in row):
        own = [r for r in rows if r["part"] == "speed" and r["model"] == model and r.get("name") == r.get("beside")]
        if own := [row for row in own if "tokens_per_second" in row]:
            best = max(own, key=lambda row: float(row["tokens_per_second"]))
            found.append(f"The fastest of ours, {model}: {best['name']}, {best['tokens_per_second']:.0f} tokens/s.")
    for row in rows:
        if row.get("ours_is", 2.0) < WANTED:
            ratio = f"{row['ours_is']:.3f}"
            found.append(f"Less than {WANTED} times: {row['beside']} / {row['name']}, {row['model']}: {ratio}.")
    failed = sum(bool(row.get("failed")) for row in rows)
    return [*found, f"{failed} of {len(rows)} rows failed or were left out."]

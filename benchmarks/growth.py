"""``python -m benchmarks.growth --rows 10000 100000``: what grows with the number of preferences, and how fast.

Each size is measured in processes of its own, on synthetic preferences that are made on the fly: encoding, loading the
table, the order of an epoch, a step, and the statistics of an evaluation. An exponent of 1 means that the time grows as
the data; 0, that it does not depend on the data.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.harness import Result, progress, run, show

# Name of a measurement in the results, its unit, and the highest exponent that it should have.
MEASUREMENTS = {
    "encode_s": ("encoding", 1.05),
    "load_s": ("loading the table", 1.05),
    "epoch_s": ("order of an epoch", 1.05),
    "statistics_s": ("statistics of an evaluation", 1.05),
    "step_order_s": ("order of a step", 0.0),
    "step_plan_s": ("reading and planning a step", 0.0),
    "encode_peak_bytes": ("memory of a process that encodes", 0.0),
    "load_bytes": ("private memory of a rank's table", 1.05),
}


def main() -> None:
    """Measures all sizes, fits the exponents and prints them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000], help="numbers of preferences")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a response with its prompt, on average")
    parser.add_argument("--batch", type=int, default=512, help="preferences of a step")
    parser.add_argument("--ranks", type=int, default=64, help="ranks for which a step is planned")
    parser.add_argument("--threads", type=int, default=1, help="threads of numeric libraries")
    parser.add_argument("--json", action="store_true", help="print the results as one line of JSON")
    options = parser.parse_args()
    results: dict[int, Result] = {}
    for rows in sorted(options.rows):
        with tempfile.TemporaryDirectory() as folder:
            specification = {**vars(options), "rows": rows, "folder": folder}
            results[rows] = {}
            for part in ("encode", "load"):
                measured = run("benchmarks.growth_contender", {**specification, "part": part}, options.threads)
                results[rows] |= {name: value for name, value in measured.items() if name != "peak_bytes"}
                progress(f"{rows} rows: {part}")
            results[rows]["table_bytes"] = sum(file.stat().st_size for file in Path(folder).rglob("*.arrow"))
    exponents = fit_exponents(results)
    if options.json:
        print(json.dumps({"rows": results, "exponents": exponents}))
        return
    titles = [(name, title) for name, (title, _) in MEASUREMENTS.items()]
    show(
        "growth",
        ["measurement", *(f"{rows:,} rows" for rows in results), "exponent", "aim"],
        [
            [
                f"{title} ({'MB' if name.endswith('bytes') else 's'})",
                *(found[name] / (1e6 if name.endswith("bytes") else 1) for found in results.values()),
                f"{exponents[name]:.2f}" if name in exponents else "",
                f"{MEASUREMENTS[name][1]:g}",
            ]
            for name, title in titles
        ],
    )
    for rows, found in results.items():
        print(
            f"{rows:,} rows: {found['encode_s'] / rows * 1e6:.0f} us and {found['table_bytes'] / rows / 1e3:.2f} KB on "
            f"disk a preference of {found['tokens'] / rows:.0f} tokens"
        )


def fit_exponents(results: dict[int, Result]) -> dict[str, float]:
    """Fits each measurement as a power of the number of rows by least squares; empty for a single size."""
    if len(results) < 2:
        return {}
    sizes = np.log(list(results))
    return {
        name: float(np.polyfit(sizes, np.log([max(found[name], 1e-9) for found in results.values()]), 1)[0])
        for name in MEASUREMENTS
    }


if __name__ == "__main__":
    main()

"""What a step costs as work grows: one benchmark for each value, as bars of text and as a picture."""

from typing import Any

from matplotlib.figure import Figure

from hfgpt.results.plots import FIGURE_DPI, FIGURE_SIZE, encode_png
from hfgpt.studio.bench import bench
from hfgpt.studio.job import Growth, Job
from hfgpt.studio.report import describe_machine, format_bytes, format_ratio
from hfgpt.system.console import align_columns, print_status
from hfgpt.system.storage import write_atomically

LONGEST_BAR = 40
AXES = {"block": "tokens in a row", "batch": "rows in a step", "vocabulary": "token ids", "layers": "blocks"}


def measure_growth(job: Job, growth: Growth) -> dict[str, Any]:
    """Measure a job for each value, and draw what it costs.

    Returns:
        `grow`, `values`, the `reports` of `bench`, one for each value, and their `warnings`.

    Raises:
        ValueError: the sides do not compute the same.
        ChildProcessError: a worker has died.
    """
    reports = []
    for value in growth.values:
        print_status(f"{growth.axis} {value:,}")
        reports.append(bench(growth.job(job, value)))
    draw_growth(growth, reports)
    warnings = [warning for each in reports for warning in each["warnings"]]
    return {"grow": growth.axis, "values": list(growth.values), "reports": reports, "warnings": warnings}


def render_growth(result: dict[str, Any]) -> str:
    """A bar for each side and value, as long as its step took, in plain ASCII."""
    longest = max(side["median_seconds"] for report in result["reports"] for side in report["sides"].values())
    rows = [[result["grow"], "", "ms a step", "peak memory", "", ""]]
    for value, report in zip(result["values"], result["reports"], strict=True):
        for label, side in report["sides"].items():
            ratio = format_ratio(report["ratios"][label]) if label in report["ratios"] else ""
            bar = "#" * max(1, round(LONGEST_BAR * side["median_seconds"] / longest))
            milliseconds = f"{1e3 * side['median_seconds']:,.1f}"
            rows.append([f"{value:,}", label, milliseconds, format_bytes(side["peak_bytes"]), bar, ratio])
    return "\n".join([align_columns(rows), "", *describe_machine(result["reports"][-1])])


def draw_growth(growth: Growth, reports: list[dict[str, Any]]) -> None:
    """Draw time and memory of a step against what grows; the bars are the fastest and the slowest turn."""
    figure = Figure(figsize=FIGURE_SIZE, dpi=FIGURE_DPI, layout="constrained")
    report = reports[0]
    figure.suptitle(f"hfgpt bench {report['command']}, {report['size']}, on {report['environment']['device']}")
    times = figure.add_subplot(1, 2, 1, xlabel=AXES[growth.axis], ylabel="milliseconds a step")
    memory = figure.add_subplot(1, 2, 2, xlabel=AXES[growth.axis], ylabel="peak memory, MiB")
    for label in report["sides"]:
        sides = [each["sides"][label] for each in reports]
        middle = [1e3 * side["median_seconds"] for side in sides]
        below = [most - 1e3 * min(side["seconds"]) for most, side in zip(middle, sides, strict=True)]
        above = [1e3 * max(side["seconds"]) - least for least, side in zip(middle, sides, strict=True)]
        times.errorbar(growth.values, middle, yerr=[below, above], label=label, marker="o", capsize=3)
        memory.plot(growth.values, [side["peak_bytes"] / 2**20 for side in sides], label=label, marker="o")
    for axes in (times, memory):
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    times.legend()
    write_atomically(growth.picture, encode_png(figure))

"""What a benchmark has found, as lines to read."""

from typing import Any

from hfgpt.studio.bench import OURS
from hfgpt.system.console import align_columns


def render(report: dict[str, Any]) -> str:
    """The report of `bench` as a table of the sides, their ratios, and what it all was measured on."""
    rows = [["", f"{report['unit']}/s", "ms a step", "CPU ms", "peak memory", "of the matmul peak", "of the bandwidth"]]
    for label, side in report["sides"].items():
        rows.append(
            [
                label,
                f"{side['units_per_second']:,.0f}",
                f"{1e3 * side['median_seconds']:,.1f}",
                f"{1e3 * side['median_cpu_seconds']:,.1f}",
                format_bytes(side["peak_bytes"]),
                format_share(side["share_of_matmul_peak"]),
                format_share(side["share_of_bandwidth"]),
            ]
        )
    lines = [describe_work(report), "", align_columns(rows, numbers=True), ""]
    for name, ratio in report["ratios"].items():
        lines.append(f"{OURS} is {format_ratio(ratio)} as fast as {name}")
        same = report["ratios_same_allocator"].get(name)
        if same:
            lines.append(f"with the same allocator {OURS} is {format_ratio(same)} as fast as {name}")
    for run, others in report["ratios_of_runs"].items():
        lines += [f"{run} is {format_ratio(ratio)} as fast as {name}" for name, ratio in others.items()]
    return "\n".join([*lines, "", *describe_machine(report)])


def describe_work(report: dict[str, Any]) -> str:
    work = f"{report['command']}, {report['size']}, {report['device']}"
    if report["command"] in ("train", "evaluate", "generate"):
        work += f", {report['rows']} x {report['row_tokens']} tokens, {report['precision']}"
    if report["top_k"]:
        work += f", top-k {report['top_k']}"
    if report["stride"]:
        work += f", the last {report['stride']} of each row scored"
    if report["command"] == "data":
        work += f", {report['tokenizer'] or 'a tokenizer trained on it'}"
        work += ", 1 process" if report["processes"] == 1 else f", {report['processes']} processes"
    if report["compile"]:
        work += ", compiled"
    differences = ", ".join(f"{name} {found:.0e}" for name, found in report["difference"].items())
    same = f"the same on both sides: {report['checked']} (largest difference: {differences})" if differences else ""
    return "\n".join(filter(None, [work, same]))


def describe_machine(report: dict[str, Any]) -> list[str]:
    peaks, machine = report["peaks"], report["environment"]
    product, copied = f"{peaks['flops'] / 1e9:,.0f} GFLOP/s", f"{peaks['bytes'] / 1e9:,.1f} GB/s"
    load = f"load {report['load_before']:.1f} before, {report['cpu_share_of_others']:.0%} of the CPUs used by others"
    return [
        f"medians of {report['rounds']} turns of {report['steps']} steps each; a ratio is the median of those of "
        "neighbouring turns, in brackets the least and the largest",
        f"measured peaks: {product} in matrix products, {copied} copied",
        f"{machine['device']}, {machine['cpu_count']} CPUs, {machine['threads']} threads; {load}",
        ", ".join(f"{name} {machine[name]}" for name in ("hfgpt", "torch", "transformers", "datasets", "python")),
    ]


def format_ratio(ratio: dict[str, Any]) -> str:
    wall, cpu = ratio["wall"], ratio["cpu"]
    return f"{wall['median']:.2f} x ({wall['min']:.2f}..{wall['max']:.2f}; CPU time {cpu['median']:.2f} x)"


def format_bytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def format_share(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"

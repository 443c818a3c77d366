"""A report as a table for a terminal, and as Markdown for a pull request."""

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from hfgpt.check.run import Report, Result
from hfgpt.check.versions import describe_versions
from hfgpt.system.console import result_stream

MARKS = {"pass": "✔", "fail": "✘", "n/a": "-", "not tried": "?"}


def describe_number(value: float | str | None) -> str:
    """A measured value or a bound, as short as it can be read."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def headline(report: Report) -> str:
    """One line: what was checked and what came of it."""
    counts = {status: sum(each.finding.status == status for each in report.results) for status in MARKS}
    line = (
        f"{report.subject.model_class.__name__}: {counts['pass']} promises kept, {counts['fail']} broken, "
        f"{counts['n/a']} not applicable"
    )
    return f"{line}, {counts['not tried']} not tried" if counts["not tried"] else line


def untried(report: Report) -> list[str]:
    """Which promises were begun and not ended, and last how to try those not tried; nothing if all were."""
    names = report.not_tried()
    if not names:
        return []
    begun = [each for each in report.results if each.promise.name in names and each.elapsed_seconds > 0]
    return [
        *(f"{each.promise.name}: {each.finding.detail}" for each in begun),
        f"{len(names)} not tried for want of time, neither kept nor broken. To try them: --only {','.join(names)}",
    ]


def notes(report: Report) -> list[str]:
    """What a reader must know to judge the table."""
    folder = report.subject.folder
    said = [] if folder is None else [describe_versions(folder)]
    if not report.subject.is_small:
        said.append("This class could not be built small: everything was tried at its full size.")
    return said


def explanations(result: Result) -> list[tuple[str, str]]:
    """What is said under a broken promise: (title, words)."""
    said = [("found", result.finding.detail)]
    if result.known_fault is not None:
        return [*said, ("known", f"{result.known_fault.explanation} {result.known_fault.link}")]
    return [
        *said,
        ("what this means", result.promise.meaning),
        ("usual causes", result.promise.usual_causes),
    ]


def render(report: Report) -> list[RenderableType]:
    """A table with a line for each promise; then each broken one, what that means and what usually causes it."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    table.add_column("promise", overflow="fold")  # names to be copied
    table.add_column("result", no_wrap=True)
    table.add_column("measured", justify="right")
    table.add_column("bound", justify="right")
    for result in report.results:
        finding = result.finding
        cells = [result.promise.name, f"{MARKS[finding.status]} {finding.status}"]
        table.add_row(*(Text(cell) for cell in (*cells, *map(describe_number, (finding.measured, finding.bound)))))
    lines = [*notes(report), headline(report)]
    for result in report.results:
        if result.is_failed:
            lines += ["", result.promise.name, *(f"  {title}: {words}" for title, words in explanations(result))]
    return [table, *(Text(line) for line in lines)]


def print_report(report: Report) -> None:
    """Print it to stdout, where nothing else goes."""
    console = Console(file=result_stream(), highlight=False)
    for part in render(report):
        console.print(part)
    for line in untried(report):
        console.print(Text(line), soft_wrap=True)  # names to be copied


def to_markdown(report: Report) -> str:
    """The report for a pull request: headline, table, and what is broken."""
    lines = [f"### {headline(report)}", "", *notes(report)]
    lines += ["| promise | result | measured | bound |", "|---|---|---|---|"]
    for result in report.results:
        finding = result.finding
        cells = [result.promise.name, f"{MARKS[finding.status]} {finding.status}"]
        cells += [escape(describe_number(value)) for value in (finding.measured, finding.bound)]
        lines.append(f"| {' | '.join(cells)} |")
    for result in report.results:
        if result.is_failed:
            lines += ["", f"**{result.promise.name}**", ""]
            lines += [f"- {title}: {escape(words)}" for title, words in explanations(result)]
    lines += ["", *untried(report)] if report.not_tried() else []
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Text that cannot end a cell of a table or begin a tag."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")

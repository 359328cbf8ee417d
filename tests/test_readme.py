"""The pages: links lead somewhere, commands and flags are there, and figures are those of bench/results."""

import importlib.util
import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
README, BENCHMARKS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPT = r"(?:python|torchrun --nproc-per-node \d+) (-m minichat\.\w+|[\w/]+\.py)"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        assert "://" not in file, f"{page.name}: {target} is of the network, which no test reaches"
        to = page.parent / file if file else page
        assert to.exists(), target
        assert not anchor or anchor in anchors(to), target


def said(page: Path) -> list[tuple[str, str]]:
    """(script, the rest of the command) for every command of a page: those in blocks whole, others to the backtick."""
    prose, *fenced = re.split(r"^```.*\n", re.sub(r"\s*\\\n\s*", " ", page.read_text()), flags=re.MULTILINE)
    found = [command for block in fenced[::2] for command in re.findall(SCRIPT + r"([^\n]*)", block)]
    found += re.findall("`" + SCRIPT + "([^`]*)`", "\n".join([prose, *fenced[1::2]]))
    return [(script, rest.split("#")[0]) for script, rest in found]


def flags(script: str) -> set[str]:
    """What --help of a script lists."""
    shown = subprocess.run([sys.executable, *script.split(), "--help"], capture_output=True, text=True, cwd=ROOT)
    if "the kernel needs" in shown.stderr:
        pytest.skip(shown.stderr.splitlines()[-1])
    assert not shown.returncode, f"{script}: {shown.stderr}"
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", shown.stdout))


@pytest.mark.slow
def test_commands_and_flags_are_there():
    commands = [(page, *command) for page in PAGES for command in said(page)]
    assert len(commands) > 60
    known = {script: flags(script) for script in sorted({script for _, script, _ in commands})}
    for page, script, rest in commands:
        words = [word.split("=")[0] for word in shlex.split(rest.replace("…", " ").replace("'", ""))]
        for word in words:
            if word.startswith("--"):
                assert word in known[script], f"{page.name}: {script} has no {word}"
            if word.startswith("@recipes/"):
                assert (ROOT / word[1:]).exists(), f"{page.name}: {word}"
    everywhere = set.union(*known.values())
    for page in (README, ROOT / "docs" / "recipes.md", ROOT / "docs" / "gaudi.md"):
        for quoted in re.findall(r"`(--[a-z][\w-]*)", page.read_text()):
            assert quoted in everywhere, f"{page.name}: no script has {quoted}"


def test_what_to_edit_is_there():
    text = README.read_text().partition("## Change one thing")[2].partition("## ")[0]
    rows = re.findall(r"^\| .+? \| (.+) \|$", text, re.MULTILINE)[2:]
    assert len(rows) >= 6
    for row in rows:
        file = re.search(r"`([\w/]+\.py)`", row)[1]
        code = (ROOT / file if "/" in file else ROOT / "minichat" / file).read_text()
        for name in re.findall(r"`([A-Za-z_]\w+)`", row):
            assert re.search(rf"^(?:def |class )?{name}\b", code, re.MULTILINE), f"{file} has no {name}"


def test_all_files_are_in_the_list():
    listed = (ROOT / "CONTRIBUTING.md").read_text()
    for file in [*(ROOT / "minichat").glob("*.py"), *(p for p in (ROOT / "kernels").glob("*.*") if p.is_file())]:
        assert file.name == "__init__.py" or re.search(rf"(?<![\w/]){re.escape(file.name)}", listed), file.name


def result(file: str) -> dict:
    return json.loads((RESULTS / file).read_text())


def rows_of(page: Path, header: str) -> dict[str, list[str]]:
    """The rows of a page's table whose header begins so: first cell -> the others."""
    lines = page.read_text().partition(f"\n| {header}")[2].splitlines()
    assert lines, f"{page.name} has no table {header}"
    rows = {}
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        first, *others = (cell.strip() for cell in line.strip("|").split("|"))
        rows[first] = others
    return rows


def same(shown: str, figure, percent: bool = False) -> None:
    """A cell says a figure, rounded as it is, with its range if it has brackets."""
    wanted = [figure] if isinstance(figure, float) else [figure["median"], figure["least"], figure["most"]]
    numbers = re.findall(r"\d+\.?\d*", shown)
    assert len(numbers) in (1, 3) and (len(numbers) == 1 or len(wanted) == 3), shown
    for number, value in zip(numbers, wanted):
        digits = len(number.partition(".")[2])
        assert number == f"{value * 100 if percent else value:.{digits}f}", f"{shown}: {value}"


MACHINES = {"Xeon": "cpu.json", "EPYC": "cpu-avx2.json"}


def rate(machine: str, who: str, what: str) -> float:
    """Median tokens/s of one that was measured."""
    rounds = [r for r in result(MACHINES[machine])["rounds"] if r["threads"] == 2]
    return statistics.median(r[who][what] for r in rounds if what in r.get(who, {}))


def ratio(machine: str, name: str, exact: bool, peer: str = "") -> dict:
    names = {"decode": "exact_decode" if exact else "decode_g32"}
    return result(MACHINES[machine])["ratios"][peer + names.get(name, "exact_" * exact + name)]


OURS = ("g32", "g32_int8")  # exact, int8


WHAT = {"decoding": "decode", "prompt of 128": "prefill_128", "prompt of 512": "prefill_512"}


def test_readme_int4_figures():
    rows = rows_of(README, "| `exact` (default), Xeon")
    assert len(rows) == 6
    for row, cells in rows.items():
        what, how = row.split(", ")
        peer = "ik_" if "ik_" in how else ""
        for cell, (exact, machine) in zip(cells, ((e, m) for e in (True, False) for m in MACHINES)):
            per_second = how == "tokens/s"
            same(
                cell,
                rate(machine, OURS[not exact], WHAT[what]) if per_second else ratio(machine, WHAT[what], exact, peer),
            )


def test_int4_rates():
    rows = rows_of(BENCHMARKS, "tokens/s")
    assert set(rows) == {f"{machine}, {what}" for machine in MACHINES for what in WHAT}
    for row, cells in rows.items():
        machine, what = row.split(", ")
        for cell, who in zip(cells, (*OURS, "llama", "ik")):
            same(cell, rate(machine, who, WHAT[what]))


@pytest.mark.parametrize("peer", ["", "ik_"])
def test_int4_ratios(peer):
    rows = rows_of(BENCHMARKS, f"times as fast as {peer}llama.cpp")
    assert set(rows) == {f"{machine}, {what}" for machine in MACHINES for what in WHAT}
    for row, cells in rows.items():
        machine, what = row.split(", ")
        for cell, exact in zip(cells, (True, False)):
            same(cell, ratio(machine, WHAT[what], exact, peer))


def test_int4_of_several_tokens():
    rows = rows_of(BENCHMARKS, "times | Xeon")
    names = {"eight answers at once": "batch8", "weights read, of a plain read": "bandwidth_share"}
    names |= {f"`--speculate`, {said}": f"speculate_{name}"
              for said, name in (("an edit", "edit"), ("prose", "prose"), ("code", "code"))}  # fmt: skip
    for row, cells in rows.items():
        for cell, (machine, exact) in zip(cells, ((m, e) for m in MACHINES for e in (True, False))):
            ratios, name = result(MACHINES[machine])["ratios"], names[row]
            speculated = name.startswith("speculate")  # exact's have no prefix there, int8's have
            prefix = ("" if exact else "int8_") if speculated else ("exact_" if exact else "")
            same(cell, ratios[prefix + name])


def test_the_rest_of_a_token():
    rows = rows_of(BENCHMARKS, "| Xeon, `exact` | Xeon, all")
    files = [(f"cpu-rest{name}.json", how) for name in ("", "-avx2") for how in ("", "_int8")]
    for row, cells in rows.items():
        at = re.sub(r"\D", "", row)
        for cell, (file, how) in zip(cells, files):
            figures = [r[f"rest_at_{at}{how}"] for r in result(file)["rounds"]]
            same(cell, statistics.median(figures), percent=True)


def test_training_figures():
    xeon, epyc = result("train-cpu.json"), result("train-cpu-avx2.json")
    short = list(rows_of(README, "| speed, Xeon").values())
    long = list(rows_of(BENCHMARKS, "| Xeon, speed | memory").values())
    for i, name in enumerate(("sft", "dpo")):
        for machine, r in enumerate((xeon, epyc)):
            for kind, cell in (("speed", 0), ("memory", 1)):
                figure = r["ratios"][f"{name}_{kind}"]
                same(short[i][machine + 2 * cell], figure)
                same(long[i][2 * machine + cell], figure)
    for machine, r in enumerate((xeon, epyc)):
        peer, ours = r["trl_without_checkpointing"], [x["dpo"]["ours"] for x in r["rounds"]]
        speed = statistics.median(x["rate"] for x in ours) / peer["rate"]
        memory = statistics.median(x["peak_gib"] for x in ours) / peer["peak_gib"]
        for rows, cells in ((short, (machine, machine + 2)), (long, (2 * machine, 2 * machine + 1))):
            same(rows[2][cells[0]], speed)
            same(rows[2][cells[1]], memory)


def test_demo_figures():
    seeds = result("demo.json")["seeds"]
    for row, cells in rows_of(README, "exact match").items():
        for seed, cell in zip(sorted(seeds), cells):
            same(cell, float(seeds[seed]["accuracy"][row.replace(",", "")]), percent=True)
    seconds = sorted(seed["seconds"] for seed in seeds.values())
    assert f"{seconds[0]:.0f} to {seconds[-1]:.0f} s a seed" in README.read_text()


def test_commits_of_figures():
    """Each row of the list names the commit and the file that hold its figures, and every file has its row."""
    rows = rows_of(BENCHMARKS, "what | file")
    files = {cells[0].strip("`"): cells[-1] for cells in rows.values()}
    assert set(files) == {path.name for path in RESULTS.glob("*.json")}
    for file, commit in files.items():
        assert result(file)["commit"].startswith(commit), file


def test_pages_name_modules_that_are_there():
    for page in PAGES:
        for module in re.findall(r"python -m (minichat\.\w+)", page.read_text()):
            assert importlib.util.find_spec(module), f"{page.name}: {module}"

"""Tables and plots of the ten skills, each figure from the records of the split that its title names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from eval.records import Refused, Results, made, markdown, spread
from eval.ten_skills.bench import CURVE, TEACHER
from eval.ten_skills.sizes import CONFIRM_SEEDS, SEEDS
from eval.ten_skills.variants import PIECES, SFT, VARIANTS, listens
from eval.ten_skills.world import SKILLS

STARTS = {"apart": "own tower", "teacher": "teacher's tower"}
CORE = ("sft_equal_flops", "kl_align", "dbild_align", "feature_cosine", "switch_kd", "kl_switch")
TITLES = {
    "sft": "SFT",
    "sft_low_lr": "SFT, half the rate",
    "sft_high_lr": "SFT, twice the rate",
    "sft_equal_flops": "SFT at equal FLOPs",
    "kl_align": "forward-KL align",
    "dbild_align": "DBiLD align",
    "feature_cosine": "encoder-feature cosine",
    "switch_kd": "DBiLD align + DBiLD switch (the paper)",
    "kl_switch": "KL align + KL switch",
    "blind": "blind (picture blanked)",
}
STANDS_ON = "seeds (own / teacher's)"  # the head of the column that says how many runs each mean is of


# ---- What is chosen, and among which


def candidates(results: Results, seeds: Sequence[int]) -> list[str]:
    """All variants that have every seed and listen to the teacher with a tower of its width, from the harder start."""
    names = dict.fromkeys([*VARIANTS, *_own(results)])
    return results.whole(filter(listens, names), "apart", "validation", seeds)


def best_found(results: Results, seeds: Sequence[int] = SEEDS) -> str | None:
    return results.best(candidates(results, seeds), "apart", "validation", seeds)


def best_sft(results: Results, start: str, seeds: Sequence[int] = SEEDS) -> str | None:
    return results.best(SFT, start, "validation", seeds)


def _own(results: Results) -> list[str]:
    """Variants that the bench has not, `--variant package.module:function`, by name."""
    return sorted({record["variant"] for record in results.records} - {*VARIANTS, TEACHER})


# ---- The report


def table(results: Results, size: str, seeds: Sequence[int] = SEEDS) -> str:
    """The report as markdown: core table, skills, ablations, confirmation; what has not been run has a dash.

    Raises Refused where records of one split were judged on different samples.
    """
    if not results.records:
        return f"# Ten skills, size {size}\n\nNothing has been run yet.\n"
    notes = sorted({str(record["evidence"]) for record in results.records} - {"True"})
    sections = [
        f"# Ten skills, size {size}" + "".join(f": {note}" for note in notes),
        _introduced(results, seeds),
        _core(results, seeds),
        "## By skill, own tower\n\n" + _by_skill(results, seeds),
        "## Ablations, own tower\n\n" + _ablations(results, seeds),
    ]
    if any(record["split"] == "test" and record["seed"] in CONFIRM_SEEDS for record in results.records):
        sections.append("## Confirmed: new seeds, test split\n\n" + _confirmed(results))
    return "\n\n".join(sections) + "\n"


def _introduced(results: Results, seeds: Sequence[int]) -> str:
    shown = [
        record
        for record in results.records
        if record["split"] == "validation" and (record["seed"] in seeds or record["variant"] == TEACHER)
    ]
    if not shown:
        return "Nothing has been run on the validation split yet."
    seeds_run = _seeds_of(shown)
    over = f"mean ± standard deviation over seeds {seeds_run}" if "," in seeds_run else f"seed {seeds_run} alone"
    if not seeds_run:
        over = "the teacher alone"
    return f"Average exact match over ten skills in per cent, {over} on the validation split. {made(shown)}"


def _seeds_of(records: Sequence[dict]) -> str:
    """Those of the students, "0, 1, 2"."""
    return ", ".join(map(str, sorted({record["seed"] for record in records if record["start"]})))


def _core(results: Results, seeds: Sequence[int]) -> str:
    head = ["variant", *STARTS.values(), STANDS_ON, "steps", "seconds a run"]
    shares = chance(results, "validation")
    by_chance = f"{mean(shares[name] for name in SKILLS):.1f}" if shares else "-"
    chosen = {start: best_sft(results, start, seeds) for start in STARTS}
    rates = {start: results.whole(SFT, start, "validation", seeds) for start in STARTS}
    best, among = best_found(results, seeds), len(candidates(results, seeds))

    def row(title: str, names: Mapping[str, str | None]) -> list:
        halves = [
            results.rows(names[start], start, "validation", seeds) if names.get(start) else [] for start in STARTS
        ]
        both = [each for rows in halves for each in rows]
        steps = " / ".join(str(count) for count in dict.fromkeys(each["steps"] for each in both))
        seconds = f"{mean(each['seconds'] for each in both):.0f}" if both else ""
        return [title, *(_average(rows) for rows in halves), _counts(halves), steps, seconds]

    lines = [
        ["chance (majority answer)", by_chance, by_chance, "", "", ""],
        row(TITLES["blind"], {"apart": "blind"}),
        row(f"SFT, best of its rates ({_counts(rates.values())})", chosen),
        *(row(TITLES.get(name, name), dict.fromkeys(STARTS, name)) for name in (*CORE, *_own(results))),
    ]
    if best:
        lines.append(row(f"best found of {among}: {best}", dict.fromkeys(STARTS, best)))
    teacher = results.rows(TEACHER, "", "validation", (0,))
    seconds, steps = (f"{teacher[0]['seconds']:.0f}", teacher[0]["steps"]) if teacher else ("", "")
    lines.append(["teacher", *[_average(teacher)] * 2, len(teacher) or "-", steps, seconds])

    shown = [f"{STARTS[start]}: {chosen[start]} of {', '.join(rates[start])}" for start in STARTS if chosen[start]]
    flops = [each["flops"] for each in results.rows("sft_equal_flops", "apart", "validation", seeds)]
    notes = []
    if shown:
        notes.append(f"The rate of SFT is the best of those run ({'; '.join(shown)}), the others have the plain one.")
    if flops:
        notes.append(f"A step of the paper's variant is {flops[0]:.1f} times the arithmetic of one of SFT.")
    return "\n\n".join(filter(None, [markdown(head, lines), " ".join(notes)]))


def chance(results: Results, split: str) -> dict[str, float] | None:
    """What one fixed answer scores in each skill on the samples of that split, in per cent; None where nothing has been
    judged on it. Raises Refused where its records say two things: then they are of different samples."""
    judged = [record for record in results.records if record["split"] == split]
    for record in judged:
        if record["chance"] != judged[0]["chance"]:
            first, other = (f"{each['variant']} {each['start']} {each['seed']}" for each in (judged[0], record))
            raise Refused(
                f"{split} split: the chance of {other} is not that of {first}, so that they were judged on different "
                "samples: take the records of one of the two out"
            )
    return judged[0]["chance"] if judged else None


def _average(rows: Sequence[dict]) -> str:
    return spread([row["average"] for row in rows])


def _counts(halves) -> str:
    """How many there are from each start, "3 / -"."""
    return " / ".join(str(len(half)) if half else "-" for half in halves)


def _by_skill(results: Results, seeds: Sequence[int]) -> str:
    shares, lines = chance(results, "validation"), []
    if shares:
        lines.append(["chance", "", *(f"{shares[name]:.0f}" for name in (*SKILLS, "locate"))])
    named = ["blind", best_sft(results, "apart", seeds), *CORE, *_own(results), best_found(results, seeds)]
    for name in dict.fromkeys(filter(None, named)):
        rows = results.rows(name, "apart", "validation", seeds)
        if rows:
            lines.append([TITLES.get(name, name), len(rows), *_skill_cells(rows)])
    teacher = results.rows(TEACHER, "", "validation", (0,))
    if teacher:
        lines.append(["teacher", len(teacher), *_skill_cells(teacher)])
    return markdown(["variant", "seeds", *SKILLS, "locate"], lines)


def _skill_cells(rows: list[dict]) -> list[str]:
    cells = [f"{mean(row['skills'][name] for row in rows):.0f}" for name in SKILLS]
    return [*cells, f"{mean(row['locate'] for row in rows):.0f}"]


def _ablations(results: Results, seeds: Sequence[int]) -> str:
    lines = []
    for piece, variants in PIECES.items():
        for variant in variants:
            rows = results.rows(variant.name, "apart", "validation", seeds)
            if piece in ("core", "few") or not rows:
                continue
            lines.append([variant.name, _average(rows), len(rows), piece, variant.why])
    return (
        markdown(["variant", "average", "seeds", "piece", "why it should help"], lines)
        if lines
        else "None has been run."
    )


def _confirmed(results: Results) -> str:
    # Without the teacher, whose record says the seconds of its one training, which the validation split has counted.
    shown = [each for each in results.records if each["split"] == "test" and each["seed"] in CONFIRM_SEEDS]
    lines = []
    for name in dict.fromkeys(record["variant"] for record in shown):
        halves = [results.rows(name, start, "test", CONFIRM_SEEDS) for start in STARTS]
        first = next(half for half in halves if half)
        line = [TITLES.get(name, name), *map(_average, halves), _counts(halves)]
        lines.append((bool(halves[0]), mean(row["average"] for row in first), line))
    shares, teacher = chance(results, "test"), results.rows(TEACHER, "", "test", (0,))
    by_chance = f"{mean(shares[name] for name in SKILLS):.1f}"
    rows = [["chance (majority answer)", by_chance, by_chance, ""]]
    rows += [line for *_, line in sorted(lines, key=lambda each: each[:2])]
    rows.append(["teacher", *[_average(teacher)] * 2, len(teacher) or "-"])
    return f"Seeds {_seeds_of(shown)}. {made(shown)}\n\n" + markdown(["variant", *STARTS.values(), STANDS_ON], rows)


def plots(results: Results, folder: Path, size: str, seeds: Sequence[int] = SEEDS) -> list[Path]:
    """`SIZE-bars.png`, averages with spread in both halves, and `SIZE-curves.png`, averages over steps; both of the
    validation split. A row of fewer runs than `seeds` says so."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    best = best_found(results, seeds)
    names = list(dict.fromkeys([SFT[0], *CORE, *_own(results), *([best] if best else [])]))
    is_evidence = all(record["evidence"] is True for record in results.records)
    note = "" if is_evidence else " (machinery check, not evidence)"

    figure, axes = plt.subplots(figsize=(9, 0.5 * len(names) + 1.5), layout="constrained")
    titles = {name: "SFT, best of its rates" if name == SFT[0] else TITLES.get(name, name) for name in names}
    for offset, (start, title) in enumerate(STARTS.items()):
        shown = [best_sft(results, start, seeds) if name == SFT[0] else name for name in names]
        rows = [results.rows(name, start, "validation", seeds) if name else [] for name in shown]
        values = [[row["average"] for row in each] for each in rows]
        places = [place + 0.4 * offset for place in range(len(names))]
        has = [place for place, each in zip(places, values, strict=True) if each]
        means = [mean(each) for each in values if each]
        spreads = [stdev(each) if len(each) > 1 else 0.0 for each in values if each]
        axes.barh(has, means, height=0.36, xerr=spreads, capsize=3, label=f"student starts from {title}")
        for name, each in zip(names, values, strict=True):
            titles[name] += _fewer(each, seeds, f", {title}")
    axes.set_yticks([place + 0.2 for place in range(len(names))], list(titles.values()))
    axes.invert_yaxis()
    shares = chance(results, "validation")
    if shares:
        axes.axvline(mean(shares[name] for name in SKILLS), color="grey", linestyle=":", label="chance")
    teacher = results.rows(TEACHER, "", "validation", (0,))
    if teacher:
        axes.axvline(teacher[0]["average"], color="black", linestyle="--", label="teacher")
    axes.set_xlabel(f"average exact match over ten skills, %{note}")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    bars = folder / f"{size}-bars.png"
    figure.savefig(bars, dpi=120)
    plt.close(figure)

    figure, halves = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for axes, (start, title) in zip(halves, STARTS.items(), strict=True):
        for place, name in enumerate(names):
            curves = [row["curve"] for row in results.rows(name, start, "validation", seeds) if row.get("curve")]
            if curves:
                steps = [step for step, _ in curves[0]]
                axes.plot(
                    steps,
                    [mean(curve[i][1] for curve in curves) for i in range(len(steps))],
                    "o-",
                    color=f"C{place}",  # one for both halves, which share a legend
                    label=TITLES.get(name, name) + _fewer(curves, seeds, f", {title}"),
                )
        axes.set_title(f"student starts from {title}", fontsize=10)
        axes.set_xlabel("steps")
    halves[0].set_ylabel(f"average, % ({CURVE[0]} validation samples)")
    shown = {line.get_label(): line for axes in halves for line in axes.get_lines()}
    halves[0].legend(shown.values(), shown.keys(), fontsize=7)
    figure.suptitle(f"Ten skills, size {size}{note}", fontsize=10)
    curves = folder / f"{size}-curves.png"
    figure.savefig(curves, dpi=120)
    plt.close(figure)
    return [bars, curves]


def _fewer(runs: Sequence, seeds: Sequence[int], where: str = "") -> str:
    """ " (1 of 3 seeds)" for a mean of fewer runs than there are seeds."""
    return f" ({len(runs)} of {len(seeds)} seeds{where})" if 0 < len(runs) < len(seeds) else ""

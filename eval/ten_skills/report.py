"""Tables and plots from the JSONs of the ten skills."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from eval.ten_skills.sizes import CONFIRM_SEEDS, SEEDS
from eval.ten_skills.variants import PIECES, SFT, VARIANTS
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


@dataclass(frozen=True)
class Results:
    """The JSONs of one size."""

    records: tuple[dict, ...]

    @classmethod
    def of(cls, folder: Path, size: str) -> Results:
        """Raises ValueError for a file that is no result."""
        records = []
        for path in sorted(folder.glob("*.json")):
            record = json.loads(path.read_text())
            if "variant" not in record or "average" not in record:
                raise ValueError(
                    f"{path} holds no variant and average: it is no result of the ten skills, move it away"
                )
            if record["size"] == size:
                records.append(record)
        return cls(tuple(records))

    def rows(self, variant: str, start: str, split: str, seeds: Iterable[int] = SEEDS) -> list[dict]:
        """A variant's records, in the order of the seeds."""
        seeds = tuple(seeds)
        found = [
            record
            for record in self.records
            if (record["variant"], record["start"], record["split"]) == (variant, start, split)
            and record["seed"] in seeds
        ]
        return sorted(found, key=lambda record: record["seed"])

    def best(self, names: Iterable[str], start: str, seeds: Sequence[int] = SEEDS) -> str | None:
        """The variant with the highest mean on the validation split, of those that have all seeds."""
        means = {}
        for name in names:
            rows = self.rows(name, start, "validation", seeds)
            if len(rows) == len(seeds):
                means[name] = mean(row["average"] for row in rows)
        return max(means, key=means.get) if means else None

    def best_sft(self, start: str, seeds: Sequence[int] = SEEDS) -> str | None:
        return self.best(SFT, start, seeds)

    def best_found(self, seeds: Sequence[int] = SEEDS) -> str | None:
        """Of all variants that listen to the teacher with a tower of its width, from the harder start."""
        return self.best((v.name for v in VARIANTS.values() if v.options is not None and not v.narrow), "apart", seeds)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, "53.4 ± 0.6"; without values a dash."""
    if not values:
        return "-"
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def table(results: Results, size: str, seeds: Sequence[int] = SEEDS) -> str:
    """The report as markdown: core table, skills, ablations, confirmation; what has not been run has a dash."""
    if not results.records:
        return f"# Ten skills, size {size}\n\nNothing has been run yet.\n"
    records = results.records
    notes = sorted({str(record["evidence"]) for record in records} - {"True"})
    title = f"# Ten skills, size {size}" + "".join(f": {note}" for note in notes)
    machines = " / ".join(sorted({record["machine"] for record in records}))
    minutes = sum(record["seconds"] for record in records) / 60
    commits = ", ".join(sorted({record["commit"] for record in records}))
    parts = [
        title,
        "Average exact match over ten skills in per cent, mean ± standard deviation over seeds "
        f"{_listed(seeds)} on the validation split. Made on {machines} at {commits}, {minutes:.0f} minutes of "
        "training and judging in all.",
        _core(results, seeds),
        "## By skill, own tower\n\n" + _by_skill(results, seeds),
        "## Ablations, own tower\n\n" + _ablations(results, seeds),
    ]
    if any(record["split"] == "test" and record["start"] for record in records):
        parts.append("## Confirmed: new seeds, test split\n\n" + _confirmed(results))
    return "\n\n".join(parts) + "\n"


def _core(results: Results, seeds: Sequence[int]) -> str:
    head = ["variant", *(f"{title}" for title in STARTS.values()), "steps", "seconds a run"]
    teacher = results.rows("teacher", "", "validation", (0,))
    lines = [
        ["chance (majority answer)", *[_chance(results)] * 2, "", ""],
        _core_row(results, {"apart": "blind"}, TITLES["blind"], seeds),
        _core_row(
            results,
            {start: results.best_sft(start, seeds) for start in STARTS},
            "SFT, best of its rates",
            seeds,
        ),
        *(_core_row(results, dict.fromkeys(STARTS, name), TITLES[name], seeds) for name in CORE),
    ]
    best = results.best_found(seeds)
    if best:
        lines.append(_core_row(results, dict.fromkeys(STARTS, best), f"best found: {best}", seeds))
    averages, steps = spread([row["average"] for row in teacher]), teacher[0]["steps"] if teacher else ""
    seconds = f"{teacher[0]['seconds']:.0f}" if teacher else ""
    lines.append(["teacher", averages, averages, steps, seconds])
    text = _markdown(head, lines)
    chosen = {start: results.best_sft(start, seeds) for start in STARTS}
    rates = [f"{title}: {chosen[start]}" for start, title in STARTS.items() if chosen[start]]
    flops = [record["flops"] for record in results.records if "flops" in record]
    if rates:
        text += f"\n\nThe rate of SFT is the best of those run ({'; '.join(rates)}), the others have the plain one."
    if flops:
        text += f" A step of the paper's variant is {flops[0]:.1f} times the arithmetic of one of SFT."
    return text


def _core_row(results: Results, names: dict[str, str | None], title: str, seeds: Sequence[int]) -> list:
    halves = [results.rows(names[start], start, "validation", seeds) if names.get(start) else [] for start in STARTS]
    both = [row for rows in halves for row in rows]
    cells = [spread([row["average"] for row in rows]) for rows in halves]
    seconds = f"{mean(row['seconds'] for row in both):.0f}" if both else ""
    return [title, *cells, both[0]["steps"] if both else "", seconds]


def _chance(results: Results) -> str:
    shares = results.records[0]["chance"]
    return f"{mean(shares[name] for name in SKILLS):.1f}"


def _by_skill(results: Results, seeds: Sequence[int]) -> str:
    lines = []
    chance = results.records[0]["chance"]
    lines.append(["chance", *(f"{chance[name]:.0f}" for name in SKILLS), f"{chance['locate']:.0f}"])
    names = ["blind", results.best_sft("apart", seeds), *CORE]
    best = results.best_found(seeds)
    names += [best] if best and best not in names else []
    for name in names:
        rows = results.rows(name, "apart", "validation", seeds) if name else []
        if rows:
            lines.append([TITLES.get(name, name), *_skill_cells(rows)])
    teacher = results.rows("teacher", "", "validation", (0,))
    if teacher:
        lines.append(["teacher", *_skill_cells(teacher)])
    return _markdown(["variant", *SKILLS, "locate"], lines)


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
            lines.append([variant.name, spread([row["average"] for row in rows]), piece, variant.why])
    return _markdown(["variant", "average", "piece", "why it should help"], lines) if lines else "None has been run."


def _confirmed(results: Results) -> str:
    lines = []
    for name in dict.fromkeys(record["variant"] for record in results.records if record["split"] == "test"):
        cells = []
        for start in STARTS:
            rows = results.rows(name, start if name != "teacher" else "", "test", (*CONFIRM_SEEDS, 0))
            cells.append(spread([row["average"] for row in rows]))
        lines.append([TITLES.get(name, name), *cells])
    lines.sort(key=lambda line: line[1])
    return f"Seeds {_listed(CONFIRM_SEEDS)}.\n\n" + _markdown(["variant", *STARTS.values()], lines)


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _markdown(head: list, lines: list[list]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def plots(results: Results, folder: Path, size: str, seeds: Sequence[int] = SEEDS) -> list[Path]:
    """`SIZE-bars.png`, averages with spread in both halves, and `SIZE-curves.png`, averages over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [*SFT[:1], *CORE]
    best = results.best_found(seeds)
    names += [best] if best and best not in names else []
    note = "" if all(record["evidence"] is True for record in results.records) else " (machinery check, not evidence)"

    figure, axes = plt.subplots(figsize=(9, 0.5 * len(names) + 1.5), layout="constrained")
    for offset, (start, title) in enumerate(STARTS.items()):
        shown = [results.best_sft(start, seeds) if name == "sft" else name for name in names]
        values = [[row["average"] for row in results.rows(name, start, "validation", seeds)] for name in shown]
        places = [place + 0.4 * offset for place in range(len(names))]
        has = [place for place, each in zip(places, values, strict=True) if each]
        means = [mean(each) for each in values if each]
        spreads = [stdev(each) if len(each) > 1 else 0.0 for each in values if each]
        axes.barh(has, means, height=0.36, xerr=spreads, capsize=3, label=f"student starts from {title}")
    axes.set_yticks([place + 0.2 for place in range(len(names))], [TITLES.get(name, name) for name in names])
    axes.invert_yaxis()
    axes.axvline(float(_chance(results)), color="grey", linestyle=":", label="chance")
    teacher = results.rows("teacher", "", "validation", (0,))
    if teacher:
        axes.axvline(teacher[0]["average"], color="black", linestyle="--", label="teacher")
    axes.set_xlabel(f"average exact match over ten skills, %{note}")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    bars = folder / f"{size}-bars.png"
    figure.savefig(bars, dpi=120)
    plt.close(figure)

    figure, halves = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for axes, (start, title) in zip(halves, STARTS.items(), strict=True):
        for name in names:
            curves = [row["curve"] for row in results.rows(name, start, "validation", seeds) if row.get("curve")]
            if curves:
                steps = [step for step, _ in curves[0]]
                axes.plot(
                    steps,
                    [mean(c[i][1] for c in curves) for i in range(len(steps))],
                    "o-",
                    label=TITLES.get(name, name),
                )
        axes.set_title(f"student starts from {title}", fontsize=10)
        axes.set_xlabel("steps")
    halves[0].set_ylabel("average, % (330 validation samples)")
    halves[0].legend(fontsize=7)
    figure.suptitle(f"Ten skills, size {size}{note}", fontsize=10)
    curves = folder / f"{size}-curves.png"
    figure.savefig(curves, dpi=120)
    plt.close(figure)
    return [bars, curves]

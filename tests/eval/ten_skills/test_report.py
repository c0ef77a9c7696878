"""Every figure of the report is from the records of the split that its title names, and each row says of how many."""

import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
from hand_made import record

from eval.records import Refused, Results
from eval.ten_skills import world
from eval.ten_skills.report import best_found, best_sft, plots, table

ROOT = Path(__file__).parents[3]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cpu.jsonl"


def cells(text, section, row):
    """The cells of a row by their column's head; section "" is the first table."""
    lines = text[text.index(section) :].splitlines()
    head = next(line for line in lines if line.startswith("| variant"))
    found = next(line for line in lines if line.startswith(f"| {row} |"))
    return dict(zip(*([cell.strip() for cell in line.strip("|").split("|")] for line in (head, found)), strict=True))


def test_the_table_shows_means_and_spreads_of_the_validation_split(path):
    for seed, value in enumerate((40.0, 42.0, 44.0)):
        record(path, "sft", "apart", seed, value)
        record(path, "sft_high_lr", "apart", seed, value + 1)
        record(path, "switch_kd", "apart", seed, value + 5)
        record(path, "kl_x3", "apart", seed, value + 9)
        record(path, "narrow_switch", "apart", seed, 99.0)
    record(path, "teacher", "", 0, 66.0)
    results = Results.of(path)
    assert best_sft(results, "apart") == "sft_high_lr"
    assert best_found(results) == "kl_x3"  # a narrow tower is a row of its own
    text = table(results, "cpu")
    assert "machinery check, not evidence" in text.splitlines()[0]
    assert "| SFT, best of its rates (2 / -) | 43.0 ± 2.0 | - | 3 / - | 10 | 60 |" in text
    assert "| DBiLD align + DBiLD switch (the paper) | 47.0 ± 2.0 | - | 3 / - | 10 | 60 |" in text
    assert "| best found of 2: kl_x3 | 51.0 ± 2.0 |" in text
    assert "| chance (majority answer) | 25.0 |" in text
    assert "| teacher | 66.0 | 66.0 | 1 |" in text
    assert "Confirmed" not in text
    assert [line.split(" | ")[0] for line in text[text.index("## Ablations") :].splitlines()[4:]] == [
        "| kl_x3",
        "| narrow_switch",
    ]


@pytest.mark.parametrize("first", ["validation", "test"])
def test_each_title_stands_over_its_own_split_whatever_the_order_of_the_records(path, first):
    for split in sorted(("validation", "test"), reverse=first == "validation"):
        for seed in (0, 1) if split == "validation" else (3, 4):
            more = {"flops": 2.0} if split == "validation" else {"flops": 9.0}
            record(path, "sft_equal_flops", "apart", seed, 41.0 if split == "validation" else 51.0, split=split, **more)
            record(path, "jsd", "apart", seed, 30.0 if split == "validation" else 60.0, split=split)
        record(path, "teacher", "", 0, 70.0 if split == "validation" else 80.0, split=split, seconds=600.0)
    text = table(Results.of(path), "cpu", (0, 1, 2))
    validation, test = text.split("## Confirmed")
    assert "over seeds 0, 1 on the validation split. Made on m-validation at made-validation, 14 minutes" in validation
    assert "2.0 times the arithmetic" in validation
    assert "Seeds 3, 4. Made on m-test at made-test, 4 minutes" in test  # the teacher was trained once
    for shown, chance, equal, teacher in ((validation, "25.0", "41.0", "70.0"), (test, "26.0", "51.0", "80.0")):
        assert cells(shown, "", "chance (majority answer)")["own tower"] == chance
        assert cells(shown, "", "SFT at equal FLOPs")["own tower"] == f"{equal} ± 0.0"
        assert cells(shown, "", "teacher")["own tower"] == teacher
    assert cells(text, "## By skill", "chance")["existence"] == "25"
    assert cells(text, "## Ablations", "jsd") == {
        "variant": "jsd",
        "average": "30.0 ± 0.0",
        "seeds": "2",
        "piece": "divergence",
        "why it should help": "bounded, so that rows where the student is far off do not lead",
    }


def test_a_row_says_how_many_seeds_and_rates_it_stands_on(path):
    for seed in (0, 1, 2):
        record(path, "sft", "apart", seed, 40.0)
        record(path, "sft", "teacher", seed, 50.0)
        record(path, "switch_kd", "apart", seed, 44.0)
    record(path, "sft_low_lr", "apart", 0, 90.0)  # one seed is not enough to be chosen
    record(path, "sft_high_lr", "teacher", 0, 30.0)
    record(path, "sft_high_lr", "teacher", 1, 30.0)
    record(path, "sft_high_lr", "teacher", 2, 30.0)
    record(path, "switch_kd", "teacher", 1, 55.0, steps=20)
    record(path, "kl_switch", "apart", 0, 99.0)
    record(path, "kl_switch", "apart", 1, 99.0)
    text = table(Results.of(path), "cpu")
    sft = cells(text, "", "SFT, best of its rates (1 / 2)")
    assert (sft["own tower"], sft["teacher's tower"], sft["seeds (own / teacher's)"]) == (
        "40.0 ± 0.0",
        "50.0 ± 0.0",
        "3 / 3",
    )
    assert "(own tower: sft of sft; teacher's tower: sft of sft, sft_high_lr)" in text
    paper = cells(text, "", "DBiLD align + DBiLD switch (the paper)")
    assert (paper["seeds (own / teacher's)"], paper["teacher's tower"], paper["steps"]) == ("3 / 1", "55.0", "10 / 20")
    assert cells(text, "", "KL align + KL switch")["seeds (own / teacher's)"] == "2 / -"
    assert cells(text, "", "best found of 1: switch_kd")["own tower"] == "44.0 ± 0.0"
    assert cells(text, "## By skill", "KL align + KL switch")["seeds"] == "2"
    assert cells(text, "", "teacher") == {
        **{"variant": "teacher", "own tower": "-", "teacher's tower": "-", "seeds (own / teacher's)": "-"},
        **{"steps": "", "seconds a run": ""},
    }


def test_the_confirmation_counts_its_own_seeds_alone_and_sorts_by_number(path):
    for seed, value in ((0, 1.0), (3, 9.0), (5, 11.0)):
        record(path, "sft", "apart", seed, value, split="test")
        record(path, "switch_kd", "apart", seed, 100.0, split="test")
    record(path, "jsd", "teacher", 3, 50.0, split="test")
    text = table(Results.of(path), "cpu")
    assert "Nothing has been run on the validation split yet." in text
    assert "Seeds 3, 5." in text
    confirmed = text[text.index("## Confirmed") :]
    rows = [line.split(" | ")[0] for line in confirmed.splitlines() if line.startswith("| ")]
    assert rows[2:] == [
        "| chance (majority answer)",
        "| jsd",
        "| SFT",
        "| DBiLD align + DBiLD switch (the paper)",
        "| teacher",
    ]
    assert "| SFT | 10.0 ± 1.4 | - | 2 / - |" in confirmed
    assert "| teacher | - | - | - |" in confirmed
    assert "| chance (majority answer) | - | - |" in text


def test_one_seed_is_no_mean(path):
    record(path, "teacher", "", 0, 70.0)
    assert "in per cent, the teacher alone on the validation split" in table(Results.of(path), "cpu")
    record(path, "sft", "apart", 1, 40.0)
    assert "in per cent, seed 1 alone on the validation split" in table(Results.of(path), "cpu")
    record(path, "sft", "apart", 2, 40.0)
    assert "mean ± standard deviation over seeds 1, 2 on the" in table(Results.of(path), "cpu")


def test_records_of_other_samples_share_no_table(path):
    record(path, "sft", "apart", 0, 40.0)
    record(path, "sft", "apart", 3, 40.0, split="test")  # another split has another chance
    table(Results.of(path), "cpu")
    record(path, "jsd", "apart", 0, 40.0, chance={**dict.fromkeys(world.SKILLS, 31.0), "locate": 9.0})
    with pytest.raises(Refused, match="validation split: the chance of jsd apart 0 is not that of sft apart 0"):
        table(Results.of(path), "cpu")


def test_the_plots_are_of_the_validation_split_with_a_colour_a_variant(path, tmp_path, monkeypatch):
    for seed in (0, 1, 2):
        for name, value in (("sft", 40.0), ("kl_align", 41.0), ("feature_cosine", 42.0)):
            record(path, name, "apart", seed, value)
            record(path, name, "apart", seed + 3, 90.0, split="test")
    record(path, "feature_cosine", "teacher", 1, 60.0)
    record(path, "switch_kd", "teacher", 0, 61.0)
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    bars, curves = plots(Results.of(path), tmp_path, "cpu")
    assert bars.exists()
    assert curves.exists()
    first, second = figures
    (axes,) = first.axes
    lines = {line.get_label(): line.get_xdata()[0] for line in axes.get_lines()}
    assert lines["chance"] == 25.0
    titles = [label.get_text() for label in axes.get_yticklabels()]
    assert titles[0] == "SFT, best of its rates"
    assert "encoder-feature cosine (1 of 3 seeds, teacher's tower)" in titles
    assert max(bar.get_width() for bar in axes.patches) == 61.0
    own, teachers = second.axes
    colours = {line.get_label(): line.get_color() for axes in second.axes for line in axes.get_lines()}
    assert colours["encoder-feature cosine"] == colours["encoder-feature cosine (1 of 3 seeds, teacher's tower)"]
    assert len(set(colours.values())) == 4
    assert {text.get_text() for text in own.get_legend().get_texts()} == colours.keys()
    assert [list(line.get_ydata()) for line in teachers.get_lines()] == [[59.0, 60.0], [60.0, 61.0]]
    assert matplotlib.get_backend().lower() == "agg"


def test_the_report_that_stands_is_that_of_the_results_that_stand():
    home = ROOT / "eval/results/ten_skills"
    assert table(Results.of(home / "cpu.jsonl"), "cpu") == (home / "cpu.md").read_text()


def test_the_readmes_figures_are_the_reports():
    section = (ROOT / "README.md").read_text().split("## Ten skills")[1].split("\n## ")[0]
    report = (ROOT / "eval/results/ten_skills/cpu.md").read_text().split("## By skill")[0]
    shown = [line for line in section.splitlines() if line.startswith("| ")][2:]
    figures = [figure for line in shown for figure in re.findall(r"\d+\.\d(?: ± \d+\.\d)?", line.split("|", 2)[2])]
    assert len(figures) > 10
    for figure in figures:
        assert f" {figure} " in report, figure
    chance = re.search(r"\| chance; blind student \| ([\d.]+);", section)[1]
    assert f"| chance (majority answer) | {chance} |" in report
    rates = dict(re.findall(r"(own tower|teacher's tower): \w+ of ([\w, ]+)", report))
    assert f"best of {len(rates['own tower'].split(', '))} rates" in " ".join(section.split())
    assert "best of three" not in section

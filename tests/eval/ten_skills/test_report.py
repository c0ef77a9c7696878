from hand_made import record

from eval.ten_skills.report import Results, table


def test_the_table_shows_means_and_spreads_of_the_validation_split(tmp_path):
    for seed, value in enumerate((40.0, 42.0, 44.0)):
        record(tmp_path, "sft", "apart", seed, value)
        record(tmp_path, "sft_high_lr", "apart", seed, value + 1)
        record(tmp_path, "switch_kd", "apart", seed, value + 5)
        record(tmp_path, "kl_x3", "apart", seed, value + 9)
        record(tmp_path, "narrow_switch", "apart", seed, 99.0)
    record(tmp_path, "teacher", "", 0, 66.0)
    results = Results.of(tmp_path, "cpu")
    assert results.best_sft("apart") == "sft_high_lr"
    assert results.best_found() == "kl_x3"  # a narrow tower is a row of its own
    text = table(results, "cpu")
    assert "machinery check, not evidence" in text.splitlines()[0]
    assert "| SFT, best of its rates | 43.0 ± 2.0 | - | 10 | 60 |" in text
    assert "| DBiLD align + DBiLD switch (the paper) | 47.0 ± 2.0 | - | 10 | 60 |" in text
    assert "| best found: kl_x3 | 51.0 ± 2.0 |" in text
    assert "| chance (majority answer) | 25.0 |" in text
    assert "| teacher | 66.0 | 66.0 |" in text
    assert "Confirmed" not in text
    assert [line.split(" | ")[0] for line in text[text.index("## Ablations") :].splitlines()[4:]] == [
        "| narrow_switch",
        "| kl_x3",
    ][::-1]

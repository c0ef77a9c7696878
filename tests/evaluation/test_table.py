from switchkd.evaluation.table import results_table


def scores(accuracy, majority, locate=None, **more):
    average = sum(accuracy.values()) / len(accuracy) if accuracy else None
    return {"accuracy": accuracy, "average": average, "majority": majority, **more} | (
        {"locate": locate} if locate else {}
    )


def test_a_row_a_model_a_column_a_kind():
    majority = {"count": 0.25, "exists": 0.5}
    found = {"f1": 0.5, "ap50": 0.123, "ap": 0.0, "malformed": 0.04}
    lost = {"f1": 0.0, "ap50": None, "ap": None, "malformed": 1.0}
    table = results_table(
        {
            "teacher": scores({"count": 0.5, "exists": 1.0}, majority, found, parameters=842_016),
            "blind": scores({"count": 0.0, "exists": 2 / 3}, majority, lost),
        }
    )
    assert table == (
        "| model            | parameters | count | exists | average | locate F1 | AP50 |  AP | malformed |\n"
        "|------------------|-----------:|------:|-------:|--------:|----------:|-----:|----:|----------:|\n"
        "| teacher          |      0.84M |  50.0 |  100.0 |    75.0 |      50.0 | 12.3 | 0.0 |       4.0 |\n"
        "| blind            |            |   0.0 |   66.7 |    33.3 |       0.0 |    - |   - |     100.0 |\n"
        "| one fixed answer |            |  25.0 |   50.0 |    37.5 |           |      |     |           |\n"
    )


def test_no_located_columns_without_located_questions():
    table = results_table({"teacher": scores({"exists": 1.0}, {"exists": 0.5}, parameters=1_000_000)})
    assert table == (
        "| model            | parameters | exists | average |\n"
        "|------------------|-----------:|-------:|--------:|\n"
        "| teacher          |      1.00M |  100.0 |   100.0 |\n"
        "| one fixed answer |            |   50.0 |    50.0 |\n"
    )


def test_located_questions_alone():
    found = {"f1": 0.5, "ap50": 0.5, "ap": 0.25, "malformed": 0.0}
    head, _, row, fixed = results_table({"m": scores({}, {}, found)}).splitlines()
    assert [cell.strip() for cell in head.split("|")[3:]] == ["average", "locate F1", "AP50", "AP", "malformed", ""]
    assert [cell.strip() for cell in row.split("|")[3:]] == ["-", "50.0", "50.0", "25.0", "0.0", ""]
    assert [cell.strip() for cell in fixed.split("|")[3:]] == ["-", "", "", "", "", ""]


def test_questions_of_no_kind_have_a_named_column():
    head = results_table({"m": scores({"": 0.5}, {"": 0.5})}).splitlines()[0]
    assert head == "| model            | parameters | accuracy | average |"

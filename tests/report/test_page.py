"""What the page's tables are made with: cells, columns of numbers, lists."""

from common.report.page import are_numbers, filled, listed


def test_a_cell_without_its_value_is_empty_and_counts_as_a_number():
    rows = [{"loss": 0.51234, "by": [1, 2], "note": "{loss}"}, {"loss": None}]
    assert [filled(row, "{loss:.3f}") for row in rows] == ["0.512", ""]
    assert [filled(row, "{by[0]:+d} to {by[1]:+d}") for row in rows] == ["+1 to +2", ""]
    assert filled(rows[0], "{note}") == "{loss}", "a value is no format"
    assert are_numbers(rows, "{loss:.1%}") and not are_numbers(rows, "{note}")


def test_a_list_has_a_form_for_each_of_its_items():
    assert listed({"arena": 1200, "pool": 3}, "{} {:,}") == "arena 1,200, pool 3"
    assert listed({}, "{} {:,}") == ""

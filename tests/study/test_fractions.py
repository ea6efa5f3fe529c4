import pytest

from regrow.study.fractions import parse_fractions, parse_readings, parse_shares


@pytest.mark.parametrize(
    ("text", "fractions"),
    [
        ("0-90", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        ("0-95", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        ("80-95:5", [0.8, 0.85, 0.9, 0.95]),
        (" 50, 0 ,12.5", [0, 0.125, 0.5]),
        ("0-20,10,99", [0, 0.1, 0.2, 0.99]),
        ("7-7", [0.07]),
    ],
)
def test_per_cent_become_fractions_each_once(text, fractions):
    assert parse_fractions(text) == fractions


@pytest.mark.parametrize(
    "text", ["", "x", "0,,10", "-10", "90-0", "0-90:0", "0-90:", "10-20-30", "nan", "0:90"]
)
def test_what_is_no_list_of_per_cent_is_refused(text):
    with pytest.raises(ValueError, match="such as 0-90, 0-95:5 or 0,25,50"):
        parse_fractions(text)


def test_fractions_of_one_and_everything_are_refused_with_what_to_write():
    with pytest.raises(ValueError, match=r"per cent: write 30 instead of 0\.3"):
        parse_fractions("0,0.3")
    with pytest.raises(ValueError, match="stay below 100 %, got 100"):
        parse_fractions("0-100")


def test_readings_are_names_each_once():
    assert parse_readings("zeroed, removed,,zeroed") == ["zeroed", "removed"]
    assert parse_readings("") == []


def test_a_share_or_one_for_each_of_some_layers():
    assert parse_shares("0.5") == 0.5
    assert parse_shares("layer3=0.6, layer4.0=.5") == {"layer3": 0.6, "layer4.0": 0.5}


@pytest.mark.parametrize(
    "text", ["", "half", "50%", "layer3", "layer3=", "=0.5", "a=0.5,", "a=0.5,a=0.4", "a=b"]
)
def test_what_is_no_share_is_refused(text):
    with pytest.raises(ValueError, match=r"--fraction takes .* layer3=0\.6,layer4=0\.5"):
        parse_shares(text)


@pytest.mark.parametrize(
    "text",
    [
        "0-90:0.0000000001",
        "0-90:0.0000000000000000000000000001",
        "0-90,5,0-90:0.01",
        "0-" + "9" * 30,
        "0-" + "9" * 5000,
        "1" * 400,
        "0-90:" + "0" * 5000,
        "5," * 10**6,
    ],
)
def test_too_many_points_or_digits_are_refused_at_once(text):
    with pytest.raises(ValueError, match=r"^--fractions") as refused:
        parse_fractions(text)
    assert len(str(refused.value)) < 300

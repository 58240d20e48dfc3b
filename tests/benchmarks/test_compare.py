"""What changed between two runs."""

import pytest
from stored_runs import GPU, contender, store

from benches.compare import main


@pytest.fixture
def compared(tmp_path, capsys):
    """The exit code and the lines of comparing one set of rows with another."""

    def compare(old, new, **of_new):
        code = main([str(store(tmp_path / "old.json", old)), str(store(tmp_path / "new.json", new, **of_new))])
        return code, capsys.readouterr().out.splitlines()

    return compare


ROW = "  energy: energy, forward, N=2,000 × K=10, float32: "
UNCHANGED = "1 rows in both; ours did not become slower or larger"
WORSE = "1 rows in both; ours became slower or larger"


@pytest.mark.parametrize(
    ("milliseconds", "spread", "flag"),
    [
        (11.1, 0.01, "slower"),
        (10.9, 0.01, None),  # beyond the quartiles, by less than 10 %
        (12.0, 0.095, None),  # 10.86 to 13.14, while the old one goes to 10.95
        (12.2, 0.095, "slower"),  # from 11.04
        (8.9, 0.01, "faster"),
        (9.1, 0.01, None),
        (8.4, 0.095, None),  # to 9.2, while the old one begins at 9.05
        (8.2, 0.095, "faster"),  # to 8.98
    ],
)
def test_times(compared, milliseconds, spread, flag):
    old, new = contender("oodkern", 10.0, spread), contender("oodkern", milliseconds, spread)
    code, lines = compared([old], [new])
    if flag is None:
        assert (code, lines) == (0, [UNCHANGED])
    else:
        ratio = f"{milliseconds / 10:.2f}"
        assert lines[:2] == [
            f"{flag}:",
            f"{ROW}oodkern: 10.0 -> {milliseconds:.{2 if milliseconds < 10 else 1}f} ms, {ratio} of it",
        ]
        assert code == (flag == "slower")


@pytest.mark.parametrize(
    ("old", "new", "flag"),
    [
        (5_000_000, 6_100_000, "larger"),
        (5_000_000, 5_900_000, None),  # 18 %, less than 1 MB
        (50_000_000, 54_000_000, None),  # 4 MB, less than 10 %
        (50_000_000, 56_000_000, "larger"),
        (0, 1_100_000, "larger"),
        (5_000_000, 3_900_000, "smaller"),
        (50_000_000, 46_000_000, None),
        (None, 5_000_000, None),
    ],
)
def test_memory(compared, old, new, flag):
    code, lines = compared([contender("oodkern", 1.0, beyond_bytes=old)], [contender("oodkern", 1.0, beyond_bytes=new)])
    assert code == (flag == "larger")
    assert [line for line in lines if not line.startswith(" ")] == [
        *([f"{flag}:"] if flag else []),
        WORSE if flag == "larger" else UNCHANGED,
    ]


def test_a_rival_that_is_slower_and_larger_is_told_and_no_failure(compared):
    code, lines = compared([contender("eager", 1.0)], [contender("eager", 2.0, beyond_bytes=50_000_000)])
    assert code == 0
    assert lines == [
        "slower:",
        f"{ROW}eager: 1.00 -> 2.00 ms, 2.00 of it",
        "larger:",
        f"{ROW}eager: 5.0 -> 50 MB",
        UNCHANGED,
    ]


def test_rows_are_told_apart(compared):
    """By room, case, sizes, dtype and contender: none of these is compared with the first."""
    others = [
        contender("oodkern", 9.0, room="norm"),
        contender("oodkern", 9.0, case="energy, backward"),
        contender("oodkern", 9.0, sizes={"N": 2000, "K": 11}),
        contender("oodkern", 9.0, dtype="bfloat16"),
        contender("eager", 9.0),
    ]
    code, lines = compared([contender("oodkern", 1.0)], others)
    assert code == 0
    assert [line for line in lines if ".json" in line] == [lines[0], lines[2]]
    assert lines[1] == f"{ROW}oodkern"
    assert len(lines) == 3 + len(others) + 1
    assert lines[-1].startswith("0 rows in both")


def test_machines_differ(compared):
    same, other = contender("oodkern", 1.0), {"machine": GPU | {"commit": "def5678"}}
    assert compared([same], [same], **other) == (
        0,
        [
            "The machines differ, so this is no comparison of code:",
            "  device: cpu / cuda",
            "  gpu: None / Loom",
            "  cuda: None / 13.0",
            "  memory_bytes: None / 10000000000",
            UNCHANGED,
        ],
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ("{", "Expecting property name"),
        ("[]", "expected a run that"),
        ('{"benchmarks": [{"extra_info": {"room": "energy"}, "fullname": "a::b"}]}', "no 'stats'"),
    ],
)
def test_unreadable(tmp_path, capsys, content, words):
    good, bad = store(tmp_path / "good.json", []), tmp_path / "bad.json"
    if content is not None:
        bad.write_text(content)
    assert main([str(good), str(bad)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"{bad}: " if content else "")
    assert words in said.err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "python -m benches.compare benches/results/" in capsys.readouterr().out

"""docs/performance.md, its plots and the blocks of the README say what the stored runs do."""

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from stored_runs import PAGE, PLOT, ROWS, change, growth, run_of

from benches.report import main
from benches.stored import new_path


@pytest.fixture
def checkout(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "checkout"))


def checked(root, capsys):
    code = main(["--check"], root)
    return code, capsys.readouterr().out.splitlines()


def test_what_was_written_passes(written, capsys):
    assert checked(written, capsys) == (0, [])
    assert sorted(str(one.relative_to(written)) for one in written.glob("docs/**/*.*")) == [PAGE, PLOT]


def without_marks(root):
    with Image.open(root / PLOT) as image:
        image.load()
    image.info.clear()
    image.save(root / PLOT)


CHANGES = {
    "a number on the page": (lambda root: change(root / PAGE, "2.50", "2.60"), {PAGE}),
    "no page": (lambda root: (root / PAGE).unlink(), {PAGE}),
    "a number in the README": (lambda root: change(root / "README.md", "2.50", "2.60"), {"README.md"}),
    "a time of the run": (
        lambda root: change(next(root.glob("benches/**/*.json")), '"median": 0.025', '"median": 0.035'),
        {PAGE, PLOT, "README.md"},
    ),
    "a digit that no table shows": (
        lambda root: change(next(root.glob("benches/**/*.json")), "1.25e-07", "1.251e-07"),
        {PAGE, PLOT},
    ),
    "no plot": (lambda root: (root / PLOT).unlink(), {PLOT}),
    "a plot of no known run": (without_marks, {PLOT}),
    "no picture": (lambda root: (root / PLOT).write_text("PNG"), {PLOT}),
    "a plot too many": (lambda root: shutil.copy(root / PLOT, root / "docs/plots/old.png"), {"docs/plots/old.png"}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_differs_is_named(checkout, capsys, what):
    make, names = CHANGES[what]
    make(checkout)
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    code, lines = checked(checkout, capsys)
    assert code == 1
    assert {line.split(": ")[0] for line in lines if re.match(r"(docs/|README)\S+: ", line)} == names
    assert before == {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}, (
        "--check writes nothing"
    )


def test_writing_again_mends_it(checkout, capsys):
    for what in ("a number on the page", "a number in the README", "no picture", "a plot too many"):
        CHANGES[what][0](checkout)
    assert main([], checkout) == 0
    assert checked(checkout, capsys) == (0, [])


def test_plots_of_a_newer_run_are_missed(checkout, capsys):
    """The series are others, too."""
    run_of(checkout, [*ROWS, growth("chunked", (0.3, 3.0, 30.0), None)], "abacus/2026-01-03-def5678.json")
    code, lines = checked(checkout, capsys)
    (line,) = (line for line in lines if line.startswith(PLOT))
    assert code == 1
    assert "oodkern-run is " in line
    assert "oodkern-series is oodkern; eager, expected oodkern; eager; chunked" in line


def test_plots_are_small(written):
    assert 5_000 < (written / PLOT).stat().st_size < 80_000
    with Image.open(written / PLOT) as image:
        assert image.width >= 1200
        assert len(image.getcolors()) > 10


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("other.json", "{}", "no runs in it"),
        ("abacus/run.json", "{}", "a name that begins with the date"),
        ("abacus/2026-01-01-a.json", "{", "2026-01-01-a.json: Expecting property name"),
        ("abacus/2026-01-01-a.json", "{}", "no 'benchmarks'"),
        ("abacus/2026-01-01-a.json", '{"benchmarks": [], "datetime": "", "machine_info": {}}', "no case in it"),
    ],
)
def test_results_that_are_none(tmp_path, capsys, name, content, words):
    path = tmp_path / "results" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert main([str(tmp_path / "results")], tmp_path) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<!-- benchmarks: romos -->\n<!-- /benchmarks -->", "benchmarks: romos: expected one of rooms, methods"),
        (
            "<!-- benchmarks: rooms -->\n\n<!-- benchmarks: jobs -->\n<!-- /benchmarks -->",
            "benchmarks: rooms: no <!-- /benchmarks --> after it",
        ),
    ],
)
def test_markers_that_are_none(tmp_path, capsys, text, words):
    (tmp_path / "README.md").write_text(text)
    run_of(tmp_path, ROWS[:3])
    assert main([], tmp_path) == 2
    assert words in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == text


def test_a_run_takes_the_name_of_no_other(tmp_path):
    first = new_path(tmp_path, "abc")
    first.touch()
    second = new_path(tmp_path, "abc")
    second.touch()
    assert [first.name[10:], second.name[10:], new_path(tmp_path, "abc").name[10:]] == [
        "-abc.json",
        "-abc-2.json",
        "-abc-3.json",
    ]
    assert new_path(tmp_path, None).name[10:] == "-no-commit.json"


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "python -m benches.report --check" in capsys.readouterr().out


def test_the_checkout_says_what_its_runs_do(capsys):
    assert main(["--check"]) == 0, capsys.readouterr()
